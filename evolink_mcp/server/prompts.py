"""Publish the prompts, and complete their arguments and those of the resource templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.prompts import Prompt
from mcp_types import (
    Completion,
    CompletionArgument,
    CompletionContext,
    PromptReference,
    ResourceTemplateReference,
)
from pydantic import Field

from evolink_mcp.api.models import DEFAULT_MODEL, QUALITIES
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.studio import Studio

COMPLETIONS_MAX = 100  # limit of the protocol for one answer
RECENT_TASKS = 200
COMMON_SETS = ("1:1, 4:5, 9:16, 16:9", "1200x628, 1080x1080, 1080x1920", "2:1, 3:1, 16:9")

Size = Annotated[
    str,
    Field(description="A ratio such as 16:9, pixels such as 1536x1024, or auto. Blank: chosen for the subject."),
]
Quality = Annotated[str, Field(description="low, medium or high. Blank: medium.")]
PictureWord = Annotated[
    str,
    Field(description="Which picture: evolink://images/… of an earlier result, a file path, or a web address."),
]

ONCE = (
    "Call generate_image exactly once{each}; it is paid. If it answers before the picture is ready, call get_task with "
    "its task_id until the picture is ready, and do not buy again. Then show me the picture and the path of its file."
)


def add_prompts(server: MCPServer[Any]) -> None:
    """Publish the prompts. Each one needs generate_image."""
    for prompt in _prompts():
        server.add_prompt(prompt)


@cache
def _prompts() -> Sequence[Prompt]:
    """Return all prompts. All servers of this process share them: a team's server has one MCP server for each tenant."""
    prompts: list[Prompt] = []

    def add(title: str, description: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
        def decorate(function: Callable[..., str]) -> Callable[..., str]:
            prompts.append(Prompt.from_function(function, title=title, description=description))
            return function

        return decorate

    @add(title="New picture", description="Describe it, choose a shape, and get it in one paid call.")
    def new_picture(
        subject: Annotated[str, Field(description="Subject of the picture. Mood, light and style are welcome too.")],
        size: Size = "",
        quality: Quality = "",
        use: Annotated[
            str, Field(description="Use of the picture, such as a blog header. Blank: no special use.")
        ] = "",
    ) -> str:
        shape = (
            f"Size: {size}. Call compute_size first, and show me the pixels and the price."
            if size.strip()
            else "Choose a shape for this subject. Call compute_size first, and show me the pixels and the price."
        )
        return _brief(
            f"Make one new picture with EvoLink: {subject}",
            use and f"It is for: {use}.",
            shape,
            quality and f"Quality: {quality}.",
            "Write the prompt in full sentences: subject, setting, light, composition, style. Invent no text in it.",
            ONCE.format(each=""),
        )

    @add(title="Edit this picture", description="Change one thing in a picture and keep the rest.")
    def edit_picture(
        picture: PictureWord,
        change: Annotated[str, Field(description="The change that you want.")],
        keep: Annotated[str, Field(description="Parts that must not change. Blank: everything else.")] = "",
        quality: Quality = "",
    ) -> str:
        return _brief(
            f"Edit this picture with EvoLink: {picture}",
            f"Change: {change}",
            f"Keep exactly as it is: {keep or 'everything else, with its composition, light and colours'}.",
            f'Give generate_image image_urls ["{picture}"] and a prompt that names the change and what stays. '
            "Take the size of the original (its task tells it, or compute_size the legal one nearest to it).",
            quality and f"Quality: {quality}.",
            ONCE.format(each=""),
        )

    @add(title="Variations", description="Several different takes on one picture or idea.")
    def variations(
        of: Annotated[str, Field(description="A picture (evolink://images/…, file or web address) or an idea.")],
        # Arguments of an MCP prompt are always text.
        count: Annotated[str, Field(description="How many, 1 to 10. Each is billed. Blank: 3.")] = "",
        differ: Annotated[
            str, Field(description="Difference between them, such as colour or angle. Blank: free choice.")
        ] = "",
        quality: Quality = "",
    ) -> str:
        number = count.strip() or "3"
        return _brief(
            f"Make {number} variations with EvoLink of: {of}",
            f"They differ in: {differ}." if differ else "They differ freely in composition, light and colour.",
            quality and f"Quality: {quality}.",
            f"Call compute_size first with n={number} and show me the price.",
            "If it is a picture, give it in image_urls. If one prompt with n suits them all, that is the one call; if "
            "each needs words of its own, make one call for each of them, one after the other.",
            ONCE.format(each=" for each prompt"),
        )

    @add(
        title="One motif in several sizes", description="The same motif for a banner, a post, a story: a matching set."
    )
    def size_set(
        motif: Annotated[str, Field(description="Motif of all pictures.")],
        sizes: Annotated[str, Field(description="Which sizes, with commas: 1:1, 9:16, 1200x628")],
        quality: Quality = "",
    ) -> str:
        return _brief(
            f"Make one motif in several sizes with EvoLink: {motif}",
            f"Sizes: {sizes}.",
            quality and f"Quality: {quality}.",
            "Call compute_size for every size first: a ratio as size; pixels that are not legal as width and height, "
            "which names the nearest legal size and the crop. Tell me the list with the total price, and wait for my "
            "yes.",
            "Make the first one alone. Give its evolink:// address as image_urls to the others, so that all show the "
            "same motif, and say in each prompt how the composition fits its shape.",
            ONCE.format(each=" for each size"),
        )

    return prompts


def add_completions(server: MCPServer[Any], studio: Studio) -> None:
    """Publish completions for the prompts' arguments and for the resource templates of `studio`."""

    @server.completion()
    async def complete(
        ref: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        context: CompletionContext | None,
    ) -> Completion | None:
        arguments = (context.arguments if context else None) or {}
        if isinstance(ref, ResourceTemplateReference):
            values = await _resource_values(ref.uri, argument.name, arguments.get("task_id"), studio)
        else:
            values = await _prompt_values(argument.name, studio)
        word = argument.value.strip().lower()
        fitting = list(dict.fromkeys(value for value in values if word in value.lower()))
        # The sort is stable, so the newest tasks stay first.
        fitting.sort(key=lambda value: not value.lower().startswith(word))
        return Completion(values=fitting[:COMPLETIONS_MAX], total=len(fitting), has_more=len(fitting) > COMPLETIONS_MAX)


def _brief(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


async def _prompt_values(name: str, studio: Studio) -> Iterable[str]:
    if name in ("picture", "of"):
        return await _pictures(studio)
    choices: dict[str, Iterable[str]] = {
        "size": ("auto", *DEFAULT_MODEL.limits.ratios),
        "sizes": COMMON_SETS,
        "quality": QUALITIES,
        "count": map(str, range(1, DEFAULT_MODEL.images_max + 1)),
    }
    return choices.get(name, ())


async def _resource_values(template: str, name: str, task_id: str | None, studio: Studio) -> Iterable[str]:
    entries = await _recent(studio)
    if template.startswith("evolink://images/"):
        entries = [entry for entry in entries if any(picture.is_saved for picture in entry.images)]
    if name == "task_id":
        return [entry.task_id for entry in entries if entry.task_id]
    if name == "index":
        chosen = [entry for entry in entries if entry.task_id == task_id] if task_id else entries
        return sorted({str(picture.index) for entry in chosen for picture in entry.images if picture.is_saved}, key=int)
    return ()


async def _pictures(studio: Studio) -> Iterable[str]:
    return [
        f"evolink://images/{entry.task_id}/{picture.index}"
        for entry in await _recent(studio)
        for picture in entry.images
        if picture.is_saved
    ]


async def _recent(studio: Studio) -> list[Entry]:
    """Return the newest entries. If the journal cannot be read, return none: a completion is not worth an error."""
    try:
        return await studio.journal.recent(RECENT_TASKS)
    except JournalUnwritable:
        return []
