"""The shapes of structured answers, as published in every tool's output schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from evolink_mcp.errors import Charged


class Pixels(BaseModel):
    width: int
    height: int


class ImageOut(BaseModel):
    """One picture."""

    index: int
    url: str | None = None
    url_expires_at: str | None = None
    path: str | None = None
    mime_type: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    resource_uri: str | None = None
    markdown: str | None = None
    error: str | None = None


class ErrorOut(BaseModel):
    code: str
    message: str
    retryable: bool
    advice: str


class NextAction(BaseModel):
    tool: str
    arguments: dict[str, Any]


class TaskOut(BaseModel):
    """What generate_image and get_task answer."""

    task_id: str | None = None
    status: str = Field("unknown", description="pending, processing, completed, failed, cancelled or unknown")
    progress: float | None = None
    created_at: str | None = None
    request: dict[str, Any] | None = None
    images: list[ImageOut] = []
    expected_size: Pixels | None = None
    charged: Charged = "unknown"
    credits: float | None = Field(default=None, description="charged by EvoLink")
    error: ErrorOut | None = None
    next_action: NextAction | None = None
    notes: list[str] = []


class TaskList(BaseModel):
    """What list_tasks answers."""

    tasks: list[dict[str, Any]] = Field([], description="as get_task answers them, newest first")
    credits_today: float | None = None
    synced: bool | None = None
    error: ErrorOut | None = None
    notes: list[str] = []


class BalanceOut(BaseModel):
    """What get_balance answers, in credits."""

    account_remaining: float | None = None
    account_used: float | None = None
    key_remaining: float | None = None
    key_used: float | None = None
    key_unlimited: bool | None = None
    error: ErrorOut | None = None


class Crop(BaseModel):
    left: int
    top: int
    width: int
    height: int


class SizeOut(BaseModel):
    """What compute_size answers."""

    width: int | None = None
    height: int | None = None
    pixels: int | None = None
    megapixels: float | None = None
    aspect_ratio: str | None = None
    downscaled: bool | None = None
    explicit_size: str | None = None
    resolution_applies: bool | None = None
    rule: str | None = None
    estimated_tokens: int | None = None
    estimated_credits: float | None = None
    estimated_usd: float | None = None
    alternatives: list[str] = []
    scale: float | None = None
    crop: Crop | None = None
    closest_ratio: str | None = None
    closest_resolution: str | None = None
    error: ErrorOut | None = None
    notes: list[str] = []
