"""The names of the tools. The settings need them before anything else is imported."""

from __future__ import annotations

from collections.abc import Iterable

from evolink_mcp.sanitize import harmless

TOOL_NAMES = (
    "generate_image",
    "generate_images",
    "get_task",
    "compute_size",
    "view_image",
    "derive_image",
    "list_tasks",
    "get_balance",
)


def tools_named(words: Iterable[str]) -> frozenset[str]:
    """Return the names of tools in `words`.

    Raises:
        ValueError: a name is unknown, or there is no name.
    """
    names = frozenset(words)
    if not names:
        raise ValueError("it names no tool")
    if unknown := sorted(names - set(TOOL_NAMES)):
        raise ValueError(f"there is no tool {harmless(unknown[0], 60)}, only {', '.join(TOOL_NAMES)}")
    if "generate_images" in names and "generate_image" not in names:
        raise ValueError("generate_images needs generate_image: without generate_image nothing can be bought")
    return names
