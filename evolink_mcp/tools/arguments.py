"""The arguments of every tool: the API's own fields and ours, each limit where its type is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from evolink_mcp.api.request import (
    IMAGES_MAX,
    Arguments,
    Count,
    GenerationRequest,
    OrNull,
    Quality,
    Resolution,
    TaskId,
    fold,
)
from evolink_mcp.api.sizes import MAX_WISH_EDGE

WAIT_MAX_S = 900
VIEW_EDGE, VIEW_EDGE_MIN, VIEW_EDGE_MAX = 1024, 64, 2048
LIST_MAX = 50

WaitSeconds = Annotated[
    float,
    Strict(),
    Field(
        ge=0,
        le=WAIT_MAX_S,
        description="How long this call waits; the task goes on after it. Default: what this host bears.",
    ),
]
Credits = Annotated[
    float, Strict(), Field(ge=0, description="Refuse, before anything is sent, if it costs more credits.")
]
Edge = Annotated[int, Strict(), Field(ge=1, le=MAX_WISH_EDGE)]


class GenerateImageArguments(GenerationRequest):
    """generate_image: the API's fields and ours."""

    wait_seconds: WaitSeconds | OrNull = None
    save_as: Annotated[
        str | OrNull, Field(description="File name, or path inside an allowed folder; never overwrites.")
    ] = None
    max_credits: Credits | OrNull = None
    force_new: Annotated[
        bool,
        Strict(),
        Field(description="Buy even if an identical earlier picture was paid but never delivered."),
    ] = False


class GetTaskArguments(Arguments):
    """get_task."""

    task_id: TaskId
    wait_seconds: WaitSeconds | OrNull = None


class ComputeSizeArguments(Arguments):
    """compute_size: a size to look up, or a width and height that are needed."""

    size: Annotated[str | OrNull, Field(description="auto, a ratio such as 16:9, or WxH in pixels.")] = None
    resolution: Resolution = "1K"
    quality: Quality = "medium"
    n: Count = 1
    width: Annotated[Edge | OrNull, Field(description="Instead of size: the width you need, any number.")] = None
    height: Annotated[Edge | OrNull, Field(description="With width: the height you need.")] = None


class ViewImageArguments(Arguments):
    """view_image."""

    task_id: TaskId
    index: Annotated[int, Strict(), Field(ge=0, lt=IMAGES_MAX, description="Which picture, from 0.")] = 0
    max_edge: Annotated[
        int, Strict(), Field(ge=VIEW_EDGE_MIN, le=VIEW_EDGE_MAX, description="Longest edge in pixels.")
    ] = VIEW_EDGE


Status = Annotated[
    Literal["pending", "processing", "completed", "failed", "cancelled", "unknown"],
    fold("pending", "processing", "completed", "failed", "cancelled", "unknown"),
]


class ListTasksArguments(Arguments):
    """list_tasks."""

    limit: Annotated[int, Strict(), Field(ge=1, le=LIST_MAX, description="How many.")] = 10
    status: Annotated[Status | OrNull, Field(description="Only tasks of this status.")] = None
    since: Annotated[str | OrNull, Field(description="Only from this time on, ISO 8601; local without a zone.")] = None
    until: Annotated[str | OrNull, Field(description="Only up to this time.")] = None
    sync: Annotated[
        bool,
        Strict(),
        Field(description="Also ask EvoLink for the account's tasks, and about unknown outcomes."),
    ] = False


class GetBalanceArguments(Arguments):
    """get_balance takes nothing."""
