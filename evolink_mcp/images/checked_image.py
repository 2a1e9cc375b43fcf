"""Pictures that an order may be made from, once they are checked, and what identical orders have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from evolink_mcp.errors import ReferenceRefused
from evolink_mcp.journal.entry import Reference
from evolink_mcp.sanitize import harmless

GIVEN_MAX = 300  # characters
MASK_ADVICE = "Use a PNG of the picture's size that is transparent where something is to be redrawn."


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that may be referred to.

    `mark` stands for its content wherever it is known; `url` is where EvoLink can read it already, and `read` opens it
    if it is a local one. Type and size (pixels, upright) are None for a picture that is not here; `transparent`, whether
    some pixels are, is known of a mask that is here. `task_id` and `index` name the earlier picture that it is, if known.
    """

    mark: str
    url: str | None = None
    mime_type: str | None = None
    size: tuple[int, int] | None = None
    transparent: bool | None = None
    read: Callable[[], BinaryIO] | None = None
    task_id: str | None = None
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """A request whose references may be used: its body, the pictures that were found, and what the caller gave."""

    body: dict[str, Any]
    found: tuple[Found, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two requests identical: the same fields, and the same pictures wherever they come from."""
        return with_pictures(self.body, [picture.mark for picture in self.found]) if self.found else self.body

    def references(self, sent: dict[str, Any]) -> tuple[Reference, ...]:
        """What the order is made from; `sent` is the body that goes to EvoLink."""
        urls = [*sent.get("image_urls", []), *filter(None, [sent.get("mask_url")])]
        found = self.found or tuple(Found(url) for url in urls)
        return tuple(
            Reference(_shown(given), url, sha256_of(one.mark), one.task_id, one.index)
            for given, url, one in zip(self.given, urls, found, strict=True)
        )


def sha256_of(mark: str) -> str | None:
    """The SHA-256 in a mark, in hex; None if it is that of an address."""
    kind, _, digest = mark.partition(":")
    return digest if kind == "sha256" else None


def _shown(given: str) -> str:
    """What the caller gave, on one line; a data: URI only by its type and length."""
    if given[:5].lower() == "data:":
        return f"{harmless(given.partition(',')[0], 60)},… ({len(given):,} characters)"
    return harmless(given, GIVEN_MAX)


def with_pictures(body: dict[str, Any], named: list[str]) -> dict[str, Any]:
    """The body with these addresses, or marks, in place of its references; the mask's is the last."""
    count = len(body["image_urls"])
    changed = {**body, "image_urls": named[:count]}
    if "mask_url" in body:
        changed["mask_url"] = named[count]
    return changed


def check_mask(mask: Found, first: Found) -> None:
    """Check that mask and picture cover each other, as far as both are known here.

    Raises:
        ReferenceRefused: they do not.
    """
    if mask.mime_type not in (None, "image/png"):
        kind = {"image/jpeg": "a JPEG", "image/webp": "a WebP"}[mask.mime_type]
        raise ReferenceRefused(f"a mask must be a PNG, and this is {kind}", advice=MASK_ADVICE)
    if mask.transparent is False:
        raise ReferenceRefused("the mask has no transparent pixels, so nothing would be redrawn", advice=MASK_ADVICE)
    if mask.size and first.size and mask.size != first.size:
        raise ReferenceRefused(
            "the mask is {}×{} pixels and the first picture {}×{} (both as they are seen, upright)".format(
                *mask.size, *first.size
            ),
            advice="Give a mask of that picture's size.",
        )
