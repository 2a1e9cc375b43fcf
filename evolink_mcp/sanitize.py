"""Foreign text made harmless: what EvoLink, a file name or an argument says is quoted as data, never obeyed."""

from __future__ import annotations

import unicodedata
from typing import Any, cast

UPSTREAM_WORDS_MAX = 300
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def harmless(text: object, limit: int = UPSTREAM_WORDS_MAX) -> str:
    """`text` on one line, at most `limit` characters, without control, bidi, zero-width or tag characters."""
    raw = str(text)[: limit * 4]
    kept = "".join(" " if c in "\r\n\t" else c for c in raw if c in "\r\n\t" or not _invisible(c))
    line = " ".join(kept.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def scrub(value: Any) -> Any:
    """`value` with lone surrogates replaced in every string: one of them would end a JSON transport."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() if _has_surrogate(value) else value
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in cast("list[Any]", value)]
    return value


def _invisible(char: str) -> bool:
    return unicodedata.category(char) in _INVISIBLE


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)
