"""The four calls of every client, and its report: one line of JSON on stdout, which drive.py checks."""

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
# The client cancels this call after three seconds and repeats it. The repeat must get the first purchase.
SLOW = ("generate_image", {"prompt": TARGET.get("slow", ""), "n": 1})
BAD = ("generate_image", {"prompt": TARGET["prompt"], "promt": "a typing error"})


def answer_of(text: Any, structured: Any = None, error: bool | None = False, **fields: Any) -> dict[str, Any]:
    """Return one answer in the form of the report. `error` is None if the client hides it."""
    return {"text": text, "structured": structured, "error": error, **fields}


def text_of(blocks: Any) -> str:
    return "\n".join(block.text for block in blocks if block.type == "text")


def result_of(result: Any, **fields: Any) -> dict[str, Any]:
    """Return a CallToolResult in the form of the report. SDK 1.x has camelCase fields, 2.x has snake_case fields."""
    structured = getattr(result, "structured_content", None) or getattr(result, "structuredContent", None)
    error = result.is_error if hasattr(result, "is_error") else result.isError
    return answer_of(text_of(result.content), structured, bool(error), **fields)


def report(package: str, protocol: str, tools: list[str], size: Any, image: Any, bad: Any, **fields: Any) -> None:
    facts = {"version": f"{package} {version(package)}", "protocol": protocol, "tools": tools, **fields}
    print("\nREPORT " + json.dumps({**facts, "size": size, "image": image, "bad": bad}))
