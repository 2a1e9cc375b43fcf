"""The four calls every client makes, and what it reports of them: one line of JSON on stdout for drive.py to judge."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

TARGET: dict[str, Any] = json.loads(sys.argv[1])
TRANSPORT = TARGET["transport"]
MODE = TARGET.get("mode", "")

SIZE = ("compute_size", {"size": "16:9", "resolution": "2K"})
IMAGE = ("generate_image", {"prompt": TARGET["prompt"], "n": 1})
# A call that gives up after three seconds, and the same call again: it must get what the first one bought.
SLOW = ("generate_image", {"prompt": TARGET.get("slow", ""), "n": 1})
BAD = ("generate_image", {"prompt": TARGET["prompt"], "promt": "a typing error"})


def seen(text: Any, structured: Any = None, error: bool | None = False, **more: Any) -> dict[str, Any]:
    """One answer, as this client hands it on; `error` None where the client does not tell."""
    return {"text": text, "structured": structured, "error": error, **more}


def text_of(blocks: Any) -> str:
    return "\n".join(block.text for block in blocks if block.type == "text")


def result_of(result: Any, **more: Any) -> dict[str, Any]:
    """An MCP CallToolResult, of whichever SDK: 1.x names its fields as the wire does, 2.x as Python does."""
    structured = getattr(result, "structured_content", None) or getattr(result, "structuredContent", None)
    error = result.is_error if hasattr(result, "is_error") else result.isError
    return seen(text_of(result.content), structured, bool(error), **more)


def report(package: str, protocol: str, tools: list[str], size: Any, image: Any, bad: Any, **more: Any) -> None:
    facts = {"version": f"{package} {version(package)}", "protocol": protocol, "tools": tools, **more}
    print("\nREPORT " + json.dumps({**facts, "size": size, "image": image, "bad": bad}))
