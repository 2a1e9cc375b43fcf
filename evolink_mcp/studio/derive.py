"""Make files of exact size, type and length from a saved image or a local image. Nothing is bought or sent."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import anyio
import anyio.to_thread

from evolink_mcp.api.targets import ICO, ICO_MAX_EDGE, MIME_TYPES, Target, parse_target
from evolink_mcp.errors import EvolinkError, JournalUnwritable, ReferenceRefused, Refused
from evolink_mcp.images.decode_protocol import CONTENT_MAX_BYTES
from evolink_mcp.images.derive import QUALITY_DEFAULT, Colour, DerivedImage, DerivePlan, Fit, Output
from evolink_mcp.images.file_types import HEAD_BYTES, FileType, foreign_type
from evolink_mcp.images.folders import open_plain, stem_of
from evolink_mcp.images.inspect import ImageFacts, sniff
from evolink_mcp.images.known_images import names_file
from evolink_mcp.images.references import References
from evolink_mcp.images.store import Derivative, ImageStore, default_stem, origin_of_entry
from evolink_mcp.images.unusable import Reason, UnusableImage
from evolink_mcp.journal.entry import DerivedFile, Entry, ResultImage
from evolink_mcp.journal.journal import Journal
from evolink_mcp.sanitize import harmless

log = logging.getLogger(__name__)

SPOOL_MAX_BYTES = 8 << 20  # longer files go to a temporary file
SOURCE_MAX_BYTES = CONTENT_MAX_BYTES
LOSSY = (MIME_TYPES["jpeg"], MIME_TYPES["webp"])


@dataclass(frozen=True, slots=True)
class DeriveRequest:
    """The files to make. The fields are those of `DerivePlan`; `mime_type` None keeps the source's or the target's."""

    targets: tuple[Target, ...]
    fit: Fit = "cover"
    focus: tuple[float, float] = (0.5, 0.5)
    mime_type: str | None = None
    quality: int | None = None
    max_bytes: int | None = None
    background: Colour | None = None
    trim: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """An image to derive from: its file, and the entry and the image of a task if one made it."""

    path: Path
    stem: str
    open_file: Callable[[], BinaryIO]
    entry: Entry | None = None
    image: ResultImage | None = None

    @property
    def task_id(self) -> str | None:
        """The ID of the task that made the image."""
        return self.entry.task_id if self.entry is not None else None


@dataclass(frozen=True, slots=True)
class Derived:
    """The result for one target: the saved file with a link for a remote caller, or `error`."""

    target: Target
    file: DerivedFile | None = None
    facts: DerivedImage | None = None
    url: str | None = None
    url_expires_at: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class DerivedSet:
    """The results for all targets, in their order. `size` is that of the source in pixels, after `trim`."""

    source: Source
    size: tuple[int, int]
    results: tuple[Derived, ...]


class Deriver:
    """Make derived files for the callers of one studio. With `has_origin` they contain prompt, task ID and model."""

    def __init__(
        self, image_store: ImageStore, references: References, journal: Journal, *, has_origin: bool = False
    ) -> None:
        self._image_store = image_store
        self._references = references
        self._journal = journal
        self._has_origin = has_origin

    async def find(self, text: str, index: int | None = None) -> Source:
        """Return the image that a text names: a path, or anything that `KnownImages.find` understands.

        An existing file is used itself, also if it is a copy of a known image.

        Raises:
            ReferenceRefused, ImageUnknown: there is no such image here.
        """
        known_images = self._references.known_images
        if names_file(text):
            try:
                path = await anyio.to_thread.run_sync(self._references.readable_file, text)
            except ReferenceRefused:
                if await known_images.find(text) is None:
                    raise
            else:
                match = await known_images.find(text)
                is_known = match is not None and match.image is not None
                entry, image = (match.entry, match.image) if match is not None and is_known else (None, None)
                return Source(path, stem_of(path), partial(self._references.opened, path), entry, image)
        entry, image = await known_images.find_image(text, index)
        return await self.source_of(entry, image)

    async def source_of(self, entry: Entry, image: ResultImage) -> Source:
        """Return a saved image of a task.

        Raises:
            Refused: the image is not saved, or its file is gone.
        """
        task_id = entry.task_id or ""
        try:
            path = await self._image_store.local_file(task_id, image)
            is_present = await anyio.to_thread.run_sync(path.is_file)
        except OSError:
            is_present = False
            path = Path()
        if not is_present:
            raise Refused(
                f"the file of picture {image.index} of {task_id} is not there",
                code="file_missing",
                advice="Call get_task with this id: it downloads a missing picture while EvoLink keeps it.",
            )
        stem = default_stem(entry, image.index) if image.path is None else stem_of(Path(image.path))
        return Source(path, stem, partial(open_plain, path), entry, image)

    async def with_exact_copies(self, entry: Entry, fit: str | None = None) -> Entry:
        """Make the exact copy of each saved image that has none. Without `fit` it is that of the entry's request.

        A failure is only logged, because the image is paid: `derive_image` can repeat it.
        """
        fit = fit or entry.request.get("fit")
        if not fit:
            return entry
        target = parse_target(fit)
        copies: dict[int, DerivedFile] = {}
        for image in entry.images:
            # A repeated save must not make the copy again.
            if not image.is_saved or any(file.target == target.name for file in image.derived):
                continue
            try:
                result = await self.derive(await self.source_of(entry, image), DeriveRequest((target,)))
            except EvolinkError as error:
                log.warning("no exact copy of picture %d of %s: %s", image.index, entry.task_id, error.message)
                continue
            if (file := result.results[0].file) is not None:
                copies[image.index] = file
        if not copies:
            return entry
        images = [
            replace(image, derived=(*image.derived, copies[image.index])) if image.index in copies else image
            for image in entry.images
        ]
        return replace(entry, images=tuple(images))

    async def derive(self, source: Source, request: DeriveRequest) -> DerivedSet:
        """Make and save a file for each target. A target that fails does not stop the others.

        Raises:
            Refused: the source cannot be used.
            FolderRefused, StoreUnusable: no file can be saved.
        """
        with (
            tempfile.SpooledTemporaryFile(SPOOL_MAX_BYTES) as spooled_source,
            tempfile.SpooledTemporaryFile(SPOOL_MAX_BYTES) as spooled_files,
        ):
            content = cast("BinaryIO", spooled_source)
            files = cast("BinaryIO", spooled_files)
            try:
                sha256 = await anyio.to_thread.run_sync(partial(self._copy, source, content))
                await self._image_store.decoder.convert_heic(content, order=source.task_id or str(source.path))
                plan = self._plan(source, request, content)
                facts, images, lengths = await self._image_store.decoder.derive(
                    content, plan, files, order=source.task_id or str(source.path)
                )
            except UnusableImage as error:
                raise _unusable(source, error) from error
            except OSError as error:
                raise Refused(
                    f"“{harmless(source.path.name, 80)}” cannot be read ({error.strerror or type(error).__name__})",
                    advice="Check its rights.",
                ) from error
            size = (facts.width, facts.height)
            sidecar = _sidecar(source, sha256, facts, request)
            results: list[Derived] = []
            position = 0
            for target, image, length in zip(request.targets, images, lengths, strict=True):
                derivative = Derivative(
                    files,
                    position,
                    length,
                    source.path,
                    source.stem,
                    target.name,
                    image.mime_type,
                    image.width,
                    image.height,
                    source.task_id,
                    sidecar,
                )
                position += length
                results.append(await self._saved(target, image, derivative, request))
        await self._record(source, [result.file for result in results if result.file is not None])
        return DerivedSet(source, size, tuple(results))

    @staticmethod
    def _copy(source: Source, into: BinaryIO) -> str:
        """Copy the source, so that it cannot change. Return its SHA-256."""
        digest = hashlib.sha256()
        size = 0
        with source.open_file() as file:
            while block := file.read(1 << 20):
                size += len(block)
                if size > SOURCE_MAX_BYTES:
                    raise UnusableImage(Reason.TOO_LARGE)
                digest.update(block)
                into.write(block)
        return digest.hexdigest()

    def _plan(self, source: Source, request: DeriveRequest, content: BinaryIO) -> DerivePlan:
        content.seek(0)
        head = content.read(HEAD_BYTES)
        known = sniff(head)
        if known is None:
            raise _foreign(source, foreign_type(head))
        return DerivePlan(
            tuple(output_of(target, request, known[0]) for target in request.targets),
            request.fit,
            request.focus,
            request.quality or QUALITY_DEFAULT,
            request.max_bytes,
            request.background,
            request.trim,
            origin_of_entry(source.entry) if self._has_origin else None,
        )

    async def _saved(
        self, target: Target, image: DerivedImage, derivative: Derivative, request: DeriveRequest
    ) -> Derived:
        if image.reason is not None:
            return Derived(target, error=_reason_of(target, image, request))
        file = await self._image_store.save_derived(derivative)
        link = None
        # The file is saved, so a missing link must not look like a failure.
        with suppress(EvolinkError):
            link = await self._image_store.link_derived(file)
        url, expires_at = link or (None, None)
        return Derived(target, file, image, url, expires_at)

    async def _record(self, source: Source, files: Sequence[DerivedFile]) -> None:
        if files and source.task_id is not None and source.image is not None:
            with suppress(JournalUnwritable):  # the sidecars name the source too
                await self._journal.add_derived(source.task_id, source.image.index, files)


def output_of(target: Target, request: DeriveRequest, source_type: str) -> Output:
    """Return the file to make for a target.

    Raises:
        Refused: an icon would be too large, or a JPEG transparent.
    """
    mime_type = request.mime_type or target.mime_type or source_type
    if mime_type == ICO and max(target.size.width, target.size.height) > ICO_MAX_EDGE:
        raise Refused(
            f"an ico has at most {ICO_MAX_EDGE}x{ICO_MAX_EDGE} pixels, and {target.name} has {target.size}",
            code="invalid_arguments",
            advice=f"Use {ICO_MAX_EDGE}x{ICO_MAX_EDGE}, or the format png.",
        )
    if mime_type == MIME_TYPES["jpeg"] and request.background is not None and request.background[3] < 255:
        raise Refused(
            "a jpeg cannot be transparent",
            code="invalid_arguments",
            advice="Give a background colour such as white, or the format png or webp.",
        )
    sizes = target.sizes if mime_type == ICO else (target.size,)
    return Output(tuple((size.width, size.height) for size in sizes), mime_type)


def _sidecar(source: Source, sha256: str, facts: ImageFacts, request: DeriveRequest) -> dict[str, Any]:
    index = source.image.index if source.image is not None else None
    return {
        "task_id": source.task_id,
        "index": index,
        "derived_from": {
            "path": str(source.path),
            "sha256": sha256,
            "task_id": source.task_id,
            "index": index,
            "width": facts.width,
            "height": facts.height,
        },
        "fit": request.fit,
    }


def _reason_of(target: Target, image: DerivedImage, request: DeriveRequest) -> str:
    if image.reason is Reason.ABOVE_MAX_BYTES:
        hint = "" if image.mime_type in LOSSY else ", or format webp or jpeg"
        kind = image.mime_type.partition("/")[2].removeprefix("x-").replace("icon", "ico")
        return (
            f"max_bytes={request.max_bytes:,} is too small: as {kind} it has at least {image.smallest_bytes:,} bytes. "
            f"Give max_bytes={image.smallest_bytes}{hint}."
        )
    return f"{target.size} needs too much memory. Give a smaller target."


def _foreign(source: Source, file_type: FileType | None) -> Refused:
    kind = "not a PNG, JPEG or WebP" if file_type is None else f"{file_type.name}, and not a PNG, JPEG or WebP"
    advice = "Give the path of a picture." if file_type is None else file_type.advice
    return Refused(f"“{harmless(source.path.name, 80)}” is {kind}", code="source_unusable", advice=advice)


def _unusable(source: Source, error: UnusableImage) -> Refused:
    return Refused(
        f"“{harmless(source.path.name, 80)}” cannot be used: {error}",
        code="source_unusable",
        advice="Give a whole PNG, JPEG or WebP with at most 50 megapixels.",
    )
