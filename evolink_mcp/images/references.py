"""Check the reference images of a request, and turn each one into a URL that EvoLink can read.

A reference is a URL, a local file, a data: URI, an upload or an earlier result.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, unquote_to_bytes
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.request import GenerationRequest, is_remote
from evolink_mcp.errors import DownloadFailed, ImageUnknown, JournalUnwritable, ReferenceRefused
from evolink_mcp.images.file_types import HEAD_BYTES, foreign_type
from evolink_mcp.images.folders import Folders, open_plain
from evolink_mcp.images.inspect import sniff
from evolink_mcp.images.known_images import KnownImages, names_file
from evolink_mcp.images.store import ImageStore
from evolink_mcp.images.unusable import Reason, UnusableImage
from evolink_mcp.journal.entry import Entry, ReferenceImage, ResultImage
from evolink_mcp.journal.journal import Journal, Upload
from evolink_mcp.sanitize import harmless

# EvoLink's limit for a reference image.
REFERENCE_MAX_BYTES = 50 << 20
# Each reference image at work needs up to two temporary files.
IMAGES_AT_ONCE = 4
BLOCK_BYTES = 1 << 20
SPOOL_MAX_BYTES = 1 << 20  # a larger image goes to a temporary file
# EvoLink deletes an upload after 72 h, and a running task must still be able to read it.
UPLOAD_LIVES_S = 71 * 3600
# EvoLink reads a reference some time after the POST. An expired link would make the task fail.
LINK_MARGIN_S = 600
SOURCE_MAX_CHARS = 300  # of a source in the journal
SOURCE_PROMPT_MAX_CHARS = 1_000  # of the source's prompts in the journal
UPLOAD_URI = re.compile(r"evolink://uploads/([0-9a-f]{64})")
TRANSPARENT_MASK_NOTE = "The mask is completely transparent, so EvoLink redraws the whole picture."
MASK_ADVICE = "Use a PNG of the picture's size that is transparent where something is to be redrawn."
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A reference image that passed the checks.

    `content_id` is "sha256:" and the hash of the content, or the URL if the content is unknown. `url` is set if EvoLink
    can read the image already. `open_file` opens a local image. MIME type and size (pixels, upright) are None for an
    image that is not on this machine. `transparent_share` is set for a local mask. `task_id` and `index` name the
    earlier result that the image is, if known, and `source_prompt` is its prompt. `expires_at` (epoch seconds) is the
    end of an upload.
    """

    content_id: str
    url: str | None = None
    mime_type: str | None = None
    size: tuple[int, int] | None = None
    transparent_share: float | None = None
    open_file: Callable[[], BinaryIO] | None = None
    task_id: str | None = None
    index: int | None = None
    expires_at: float | None = None
    source_prompt: str | None = None

    @property
    def sha256(self) -> str | None:
        """The SHA-256 of the content in hex, or None if the content is unknown."""
        kind, _, digest = self.content_id.partition(":")
        return digest if kind == "sha256" else None


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """The body of a request with its checked reference images. `sources` are the references as the caller wrote them.

    If every reference is a URL that the journal does not know, `images` is empty. `notes` are remarks for the answer.
    """

    body: dict[str, Any]
    images: tuple[CheckedImage, ...] = ()
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_uploads(self) -> bool:
        """Whether `upload_all` must upload an image."""
        return any(image.url is None for image in self.images)

    @property
    def identity(self) -> dict[str, Any]:
        """The body with a content ID in place of each reference. It is equal for identical requests."""
        if not self.images:
            return self.body
        return _with_references(self.body, [image.content_id for image in self.images])

    def references(self, sent_body: dict[str, Any]) -> tuple[ReferenceImage, ...]:
        """Return the references for the journal. `sent_body` is the body that goes to EvoLink."""
        urls = [*sent_body.get("image_urls", []), *filter(None, [sent_body.get("mask_url")])]
        images = self.images or tuple(CheckedImage(url) for url in urls)
        return tuple(
            ReferenceImage(_short_source(source), url, image.sha256, image.task_id, image.index, image.source_prompt)
            for source, url, image in zip(self.sources, urls, images, strict=True)
        )


class References:
    """Check and upload the reference images of one profile.

    With `local` False (callers on other machines) no local file is read.
    """

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        folders: Folders,
        image_store: ImageStore,
        *,
        local: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._journal = journal
        self._folders = folders
        self._image_store = image_store
        self._clock = clock
        self.known_images = KnownImages(journal, folders, is_local=local)
        self._at_work = anyio.CapacityLimiter(IMAGES_AT_ONCE)
        # A lock exists only while an upload holds it or waits for it, so the dictionary does not grow.
        self._upload_locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def check(self, request: GenerationRequest) -> CheckedRequest:
        """Check every reference. Nothing is sent.

        Raises:
            ReferenceRefused: a reference cannot be used.
        """
        body = request.body()
        image_sources = list(request.image_urls or [])
        sources = (*image_sources, *filter(None, [request.mask_url]))
        images = [await self._check_source(source) for source in image_sources]
        if request.mask_url:
            mask = await self._check_source(request.mask_url, is_mask=True)
            _check_mask(mask, images[0])
            images.append(mask)
        has_only_unknown_urls = all(image.content_id == source for image, source in zip(images, sources, strict=True))
        notes = tuple(TRANSPARENT_MASK_NOTE for image in images if image.transparent_share == 1)
        return CheckedRequest(body, () if has_only_unknown_urls else tuple(images), sources, notes)

    async def upload_all(self, checked: CheckedRequest) -> dict[str, Any]:
        """Upload each local image once per content. Return the body with the URLs.

        Raises:
            EvolinkError: an upload failed. It was free, and may be repeated.
        """
        urls = [image.url or (await self._upload(image)).url for image in checked.images]
        return _with_references(checked.body, urls) if urls else checked.body

    async def upload(self, open_file: Callable[[], BinaryIO]) -> CheckedImage:
        """Upload an image of a remote caller. EvoLink keeps it for 72 h; its URI is `evolink://uploads/` + its SHA-256.

        An image that this profile has uploaded before is not sent again while that upload is valid.

        Raises:
            ReferenceRefused: the image cannot be a reference.
            JournalUnwritable: the upload cannot be recorded, so no request would find it.
            EvolinkError: EvoLink refused the upload.
        """
        image = await self._check_file(open_file, "the upload", is_mask=False)
        # `_upload` records the hash of the upright copy, but the URI has the hash of the caller's file.
        sha256 = image.sha256 or ""
        upload = await self._upload(image)
        await self._journal.remember_upload(sha256, upload.url, upload.expires_at)
        return replace(image, url=upload.url, expires_at=upload.expires_at)

    def readable_file(self, source: str) -> Path:
        """Return the file of a pasted path, inside an allowed folder.

        Raises:
            ReferenceRefused: there is no such file, or the caller is on another machine.
        """
        if not self.known_images.is_local:
            raise ReferenceRefused(
                f"“{harmless(source, 80)}” is a local file, and this server does not read its files for remote callers",
                advice="Give a public URL or a data: URI, or PUT the file to /uploads of this server and give its uri.",
            )
        return self._folders.readable(source)

    def opened(self, path: Path) -> BinaryIO:
        """Open a path from `readable_file`.

        Raises:
            OSError: it is gone, or a link took its place.
        """
        return self._folders.opened(path)

    async def _check_source(self, source: str, *, is_mask: bool = False) -> CheckedImage:
        shown = harmless(source, 80)
        if source[:5].lower() == "data:":
            return await self._check_file(partial(_open_data_uri, source), "the data: URI", is_mask)
        if match := UPLOAD_URI.fullmatch(source):
            return await self._find_upload(match[1])
        if is_remote(source):
            match = await self.known_images.find(source)
            if match is None or match.entry is None or match.image is None:
                return CheckedImage(source, url=source)
            image = await self._check_result(match.entry, match.image, is_mask)
            # A valid link goes to EvoLink exactly as the caller wrote it.
            return image if image.url is None else replace(image, url=source)
        if not names_file(source):
            if (await self.known_images.find(source)) is None:
                raise ReferenceRefused(
                    f"“{shown}” is no earlier picture",
                    advice="Use evolink://images/{task_id}/{index}, or the uri of an upload.",
                )
            return await self._check_result(*await self._find_image(source), is_mask)
        try:
            path = self.readable_file(source)
        except ReferenceRefused:
            # The file of a known image may have been moved, or only EvoLink has it.
            if (await self.known_images.find(source)) is None:
                raise
            return await self._check_result(*await self._find_image(source), is_mask)
        image = await self._check_file(partial(self._folders.opened, path), f"“{shown}”", is_mask)
        origin = await self.known_images.origin_of(path, image.sha256)
        return image if origin is None else _with_origin(image, origin.entry, origin.task_id, origin.index)

    async def _find_image(self, source: str) -> tuple[Entry, ResultImage]:
        try:
            return await self.known_images.find_image(source)
        except ImageUnknown as error:
            raise ReferenceRefused(error.message, advice=error.advice) from error

    async def _find_upload(self, sha256: str) -> CheckedImage:
        url = await self._journal.find_upload(sha256, self._clock() + LINK_MARGIN_S)
        if url is None:
            raise ReferenceRefused(
                "there is no such upload of yours, or its 72 hours are over", advice="PUT it to /uploads again."
            )
        return CheckedImage(f"sha256:{sha256}", url)

    async def _check_result(self, entry: Entry, result: ResultImage, is_mask: bool) -> CheckedImage:
        """Return an earlier result: by its link while that is valid, else from its file. A mask needs the file."""
        task_id = entry.task_id or ""
        shown = f"picture {result.index} of {task_id}"
        url = result.url if result.url_expires_at - LINK_MARGIN_S > self._clock() else None
        path: Path | None = None
        if result.is_saved and (is_mask or url is None):
            with suppress(OSError, DownloadFailed):
                path = await self._image_store.local_file(task_id, result)
        if path is not None:
            image = await self._check_file(partial(open_plain, path), shown, is_mask)
            # A user may have edited the file. Then EvoLink's link shows another image.
            if image.sha256 == result.sha256:
                image = replace(image, url=url)
        elif url is not None:
            size = (result.width, result.height) if result.width and result.height else None
            image = CheckedImage(f"sha256:{result.sha256}" if result.sha256 else url, url, result.mime_type, size)
        else:
            reason = "its file is not there any more"
            if result.is_away:
                reason = f"the folder of {result.path} does not exist now; its drive or share may be disconnected"
            raise ReferenceRefused(
                f"{shown} is gone: its link has expired and {reason}", advice="Give the path of a copy instead."
            )
        return _with_origin(image, entry, task_id, result.index)

    async def _check_file(self, open_file: Callable[[], BinaryIO], shown: str, is_mask: bool) -> CheckedImage:
        async with self._at_work, _temporary_file() as file:
            content_id = await _refuse_unusable(partial(_copy, open_file, file), shown)
            await _refuse_unusable(partial(self._convert_heic, file, content_id), shown)
            _check_type(file, shown)
            check = partial(self._image_store.decoder.check_reference, file, is_mask=is_mask, order=content_id)
            facts = await _refuse_unusable(check, shown)
        share = (facts.alpha.transparent_share if facts.alpha else 0.0) if is_mask else None
        return CheckedImage(content_id, None, facts.mime_type, (facts.width, facts.height), share, open_file)

    async def _convert_heic(self, file: BinaryIO, order: str) -> None:
        await self._image_store.decoder.convert_heic(file, order=order)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if size > REFERENCE_MAX_BYTES:
            raise UnusableImage(Reason.TOO_MANY_BYTES)

    async def _upload(self, image: CheckedImage) -> Upload:
        """Return EvoLink's copy of a local image. Two calls that need the same content at once upload it once.

        The uploaded copy is upright and has no metadata.
        """
        assert image.open_file is not None
        assert image.mime_type is not None
        async with (
            # The lock is first: a call that waits for the same content must not occupy a place of `_at_work`.
            self._upload_locks.setdefault(image.content_id, anyio.Lock()),
            self._at_work,
            _temporary_file() as file,
            _temporary_file() as copy,
        ):
            await _refuse_unusable(partial(_copy, image.open_file, file, image.content_id), "a reference")
            await _refuse_unusable(partial(self._convert_heic, file, image.content_id), "a reference")
            normalize = partial(self._image_store.decoder.normalize, file, copy, order=image.content_id)
            await _refuse_unusable(normalize, "a reference")
            sha256 = await anyio.to_thread.run_sync(_sha256, copy)
            now = self._clock()
            with suppress(JournalUnwritable):
                if (earlier := await self._journal.upload_of(sha256, now + LINK_MARGIN_S)) is not None:
                    return earlier
            # The name reveals no file of the user. EvoLink overwrites a file of the same name, so it is a hash.
            name = f"{sha256[:32]}.{image.mime_type.removeprefix('image/')}"
            url = await self._client.upload(name, image.mime_type, copy)
            upload = Upload(url, now + UPLOAD_LIVES_S)
            with suppress(JournalUnwritable):
                await self._journal.remember_upload(sha256, upload.url, upload.expires_at)
            return upload


def _with_origin(image: CheckedImage, entry: Entry | None, task_id: str, index: int | None) -> CheckedImage:
    """Return the image with the task of which it is a result. The prompts of that task's own sources belong to it."""
    prompts = [str(entry.request.get("prompt", ""))] if entry else []
    prompts += [reference.source_prompt for reference in (entry.references if entry else ()) if reference.source_prompt]
    text = "\n".join(filter(None, prompts))[:SOURCE_PROMPT_MAX_CHARS]
    return replace(image, task_id=task_id, index=index, source_prompt=text or None)


def _check_type(file: BinaryIO, shown: str) -> None:
    """Refuse a file of another type by its first bytes, and name the type."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    file_type = foreign_type(head) if sniff(head) is None else None
    if file_type is not None:
        raise ReferenceRefused(
            f"{shown} is {file_type.name}, and EvoLink reads only PNG, JPEG and WebP", advice=file_type.advice
        )


def _check_mask(mask: CheckedImage, first: CheckedImage) -> None:
    """Check that the mask fits the first reference image. Unknown properties pass."""
    if mask.mime_type not in (None, "image/png"):
        kind = {"image/jpeg": "a JPEG", "image/webp": "a WebP"}[mask.mime_type]
        raise ReferenceRefused(f"a mask must be a PNG, and this is {kind}", advice=MASK_ADVICE)
    if mask.transparent_share == 0:
        raise ReferenceRefused(
            "the mask has no transparent pixels (alpha of at most 127 of 255), so nothing would be redrawn",
            advice=MASK_ADVICE,
        )
    if mask.size and first.size and mask.size != first.size:
        raise ReferenceRefused(
            "the mask is {}×{} pixels and the first picture {}×{} (both as they are seen, upright)".format(
                *mask.size, *first.size
            ),
            advice="Give a mask of that picture's size.",
        )


def _with_references(body: dict[str, Any], references: list[str]) -> dict[str, Any]:
    """Return the body with other references. The last one is the mask, if the body has one."""
    count = len(body["image_urls"])
    changed = {**body, "image_urls": references[:count]}
    if "mask_url" in body:
        changed["mask_url"] = references[count]
    return changed


def _short_source(source: str) -> str:
    """Return a source on one line. Of a data: URI only its type and length remain."""
    if source[:5].lower() == "data:":
        return f"{harmless(source.partition(',')[0], 60)},… ({len(source):,} characters)"
    return harmless(source, SOURCE_MAX_CHARS)


async def _refuse_unusable(read: Callable[[], Awaitable[T]], shown: str) -> T:
    """Await `read`. Translate its errors to ReferenceRefused; `shown` names the reference."""
    try:
        return await read()
    except UnusableImage as error:
        raise ReferenceRefused(
            f"{shown} cannot be a reference: {error}", advice="Use a whole .png, .jpg or .webp."
        ) from error
    except OSError as error:
        raise ReferenceRefused(f"{shown} cannot be read ({error.strerror})", advice="Check its rights.") from error


@asynccontextmanager
async def _temporary_file() -> AsyncGenerator[BinaryIO]:
    """Yield an empty file. It stays in memory up to SPOOL_MAX_BYTES."""
    with tempfile.SpooledTemporaryFile(SPOOL_MAX_BYTES) as file:
        yield cast("BinaryIO", file)


async def _copy(open_file: Callable[[], BinaryIO], into: BinaryIO, checked_id: str | None = None) -> str:
    """Copy an image. Return its content ID, which must be `checked_id` if that is set.

    The caller works with the copy, because another program may change the file.

    Raises:
        UnusableImage: more than REFERENCE_MAX_BYTES, or the file changed since it was checked.
        OSError: the file cannot be read.
    """

    def copy() -> str:
        digest = hashlib.sha256()
        size = 0
        with open_file() as file:
            while block := file.read(BLOCK_BYTES):
                size += len(block)
                if size > REFERENCE_MAX_BYTES:
                    raise UnusableImage(Reason.TOO_MANY_BYTES)
                digest.update(block)
                into.write(block)
        into.seek(0)
        content_id = f"sha256:{digest.hexdigest()}"
        if checked_id not in (None, content_id):
            raise UnusableImage(Reason.CHANGED)
        return content_id

    return await anyio.to_thread.run_sync(copy, abandon_on_cancel=True)


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def _open_data_uri(uri: str) -> BinaryIO:
    head, comma, data = uri.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if head.lower().endswith(";base64"):
            # Some programs break the base64 into lines or percent-encode it.
            return io.BytesIO(base64.b64decode("".join(unquote(data).split()), validate=True))
        return io.BytesIO(unquote_to_bytes(data))
    except ValueError as error:
        raise ReferenceRefused("the data: URI cannot be decoded", advice="Use data:image/png;base64,…") from error
