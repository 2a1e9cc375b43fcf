"""The object store of a team: S3, Google Cloud Storage, Azure, or a folder that all servers mount."""

from __future__ import annotations

import errno
import hashlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, urlsplit

import anyio.to_thread

from evolink_mcp.errors import StoreUnusable
from evolink_mcp.images.folders import move_to_free_name
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.signing import Signer

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyStore

PATH = "/pictures/"
MARKER = ".evolink-mcp-store"  # the file with the ID of a folder store
MARKER_MAX_BYTES = 200
REMOTE = ("s3://", "gs://", "az://")
# A store that does not answer must not hold a call for long: the answer can show EvoLink's link.
RETRY_TIMEOUT_S = 20
REASON_MAX_CHARS = 200
OPERATIONS = ("put", "get", "link", "mount")
_STORE_ID = re.compile(r"[0-9a-f]{32}")
_SIGNED_PATH = re.compile(r"([0-9]{1,12})\.([0-9a-f]{64})/(.{1,1000})")


class Links:
    """Make and check links to images in a folder. The `secrets` sign the image's name and the time of expiry."""

    def __init__(self, public_url: str, secrets: Sequence[str]) -> None:
        self._public_url = public_url.rstrip("/")
        self._signer = Signer(secrets, "pictures")

    def to(self, name: str, expires_at: float) -> str:
        """Return the link to an image. `expires_at` is in epoch seconds."""
        signature = self._signer.sign(f"{int(expires_at)}.{name}")
        return f"{self._public_url}{PATH}{int(expires_at)}.{signature}/{quote(name)}"

    def read(self, path: str, now: float) -> str | None:
        """Return the image's name in the path of a link. None: the signature is wrong or the link has expired."""
        match = _SIGNED_PATH.fullmatch(path.removeprefix(PATH))
        if match is None:
            return None
        expires_at = int(match[1])
        name = match[3]
        is_valid = self._signer.verify(f"{expires_at}.{name}", match[2])
        return name if is_valid and now < expires_at else None


class ObjectStore:
    """An object store at `location`: a URL of REMOTE or an absolute folder.

    A remote store presigns its links. A folder needs `links`, which this server serves. A link lives for `link_hours`.
    The store opens at its first use. Its credentials come from the environment variables of its own SDK. `count_failure`
    receives the name of each failed operation, one of OPERATIONS.
    """

    def __init__(
        self,
        location: str,
        link_hours: float,
        links: Links | None = None,
        *,
        clock: Callable[[], float] = time.time,
        count_failure: Callable[[str], None] = lambda operation: None,
    ) -> None:
        self.count_failure = count_failure
        self._is_remote = location.startswith(REMOTE)
        self._root = location
        self._prefix = ""
        self._links = None if self._is_remote else links
        if self._is_remote:
            parts = urlsplit(location)  # older versions of obstore ignore a prefix in the URL
            self._root = f"{parts.scheme}://{parts.netloc}"
            self._prefix = parts.path.strip("/")
        self._link_lifetime_s = link_hours * 3600
        self._clock = clock
        self._opened_store: AnyStore | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the store is a folder, so that this server must serve its links."""
        return self._links is not None

    async def read_marker(self) -> str | None:
        """Return the ID in the marker file of a folder store. None: there is no such file, or no folder.

        Raises:
            StoreUnusable: the file cannot be read, or is damaged.
        """
        with self._operation("mount"):
            # A share that does not answer can block its thread for minutes.
            return await anyio.to_thread.run_sync(_read_marker, Path(self._root) / MARKER, abandon_on_cancel=True)

    async def ensure_marker(self) -> str:
        """Write the marker file of a new folder store. Return its ID, which another server may have written first.

        Raises:
            StoreUnusable: the folder does not exist or cannot be written, or the marker file is damaged.
        """
        with self._operation("mount"):
            return await anyio.to_thread.run_sync(_ensure_marker, Path(self._root) / MARKER, abandon_on_cancel=True)

    @property
    def location_hash(self) -> str:
        """A hash that names the store in the journal."""
        return hashlib.sha256(self._root.encode()).hexdigest()[:32]

    async def put(self, name: str, file: Path, mime_type: str) -> None:
        """Store an image under this name. An existing image of this name is replaced.

        Raises:
            StoreUnusable: the store does not accept it now.
        """
        with self._operation("put"):
            import obstore

            # obstore's store for a folder refuses attributes.
            attributes: Any = {"Content-Type": mime_type} if self._is_remote else None
            await obstore.put_async(self._store, self._key(name), file, attributes=attributes)

    async def get(self, name: str, into: BinaryIO) -> int:
        """Write the image to `into`. Return its size in bytes.

        Raises:
            StoreUnusable: the store does not answer, or has no such image.
        """
        size = 0
        async with self.reading(name) as (_, parts):
            async for part in parts:
                size += into.write(part)
        return size

    @asynccontextmanager
    async def reading(self, name: str) -> AsyncGenerator[tuple[int, AsyncGenerator[bytes]]]:
        """Open an image. Yield its size in bytes and its content in parts.

        Raises:
            StoreUnusable: the store does not answer, or has no such image.
        """
        with self._operation("get"):
            import obstore

            result = await obstore.get_async(self._store, self._key(name))
        # Outside `_operation`: an error of the reader is no failure of the store.
        yield result.meta["size"], self._parts(result)

    async def check(self) -> None:
        """Write, read, link and remove a test object.

        Raises:
            StoreUnusable: one of these steps failed.
        """
        with _translated_errors(is_read=False):
            import obstore

            name = f"evolink-mcp-{uuid.uuid4().hex}"
            await obstore.put_async(self._store, self._key(name), b"evolink-mcp tries the store")
            await obstore.get_async(self._store, self._key(name))
            await self.link(name)
            await obstore.delete_async(self._store, self._key(name))

    async def link(self, name: str) -> tuple[str, float]:
        """Return a link to the image that needs no login, and the time of its expiry in epoch seconds.

        Raises:
            StoreUnusable: the store cannot sign a link now.
        """
        expires_at = self._clock() + self._link_lifetime_s
        if self._links is not None:
            return self._links.to(name, expires_at), expires_at
        with self._operation("link"):
            import obstore

            store: Any = self._store
            lifetime = timedelta(seconds=self._link_lifetime_s)
            return await obstore.sign_async(store, "GET", self._key(name), lifetime), expires_at

    def linked_name(self, path: str) -> str | None:
        """Return the name of the image to which this path is a valid link."""
        return None if self._links is None else self._links.read(path, self._clock())

    @contextmanager
    def _operation(self, name: str) -> Generator[None]:
        """Raise StoreUnusable for each error of obstore, and count it. An image that the store lacks is no failure."""
        try:
            with _translated_errors(is_read=name in ("get", "link")):
                yield
        except StoreUnusable as error:
            if error.retryable:
                self.count_failure(name)
            raise

    async def _parts(self, result: Any) -> AsyncGenerator[bytes]:
        with self._operation("get"):
            async for part in result.stream():
                yield bytes(part)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @property
    def _store(self) -> AnyStore:
        if self._opened_store is None:
            from obstore.store import LocalStore, from_url  # obstore is in the extra `teams`

            if self._is_remote:
                retry: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)}
                self._opened_store = from_url(self._root, retry_config=retry)
            else:
                self._opened_store = LocalStore(prefix=self._root)
        return self._opened_store


def _read_marker(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            text = file.read(MARKER_MAX_BYTES).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not _STORE_ID.fullmatch(text):
        raise ValueError("the marker file is damaged")
    return text


def _ensure_marker(path: Path) -> str:
    """Write a complete marker file, unless there is one. Return the ID in it.

    `write_new_file` would make it unreadable for servers of another user.
    """
    part = path.with_name(f"{MARKER}-{uuid.uuid4().hex}")
    part.write_text(f"{uuid.uuid4().hex}\n", encoding="ascii")
    try:
        move_to_free_name(part, path)
    finally:
        part.unlink(missing_ok=True)
    marker = _read_marker(path)
    if marker is None:
        raise FileNotFoundError(errno.ENOENT, "the marker file was deleted")
    return marker


@contextmanager
def _translated_errors(*, is_read: bool = True) -> Generator[None]:
    """Raise StoreUnusable for each error of obstore. Its text shows neither the location nor a credential."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError, NotImplementedError) as error:
        if not is_read or not isinstance(error, FileNotFoundError):
            raise StoreUnusable(f"the store of pictures cannot be used ({_kind(error)})") from error
        raise StoreUnusable("the picture is not in the store any more", retryable=False) from error


def _kind(error: BaseException) -> str:
    """Return obstore's name of the error. Its text may contain URLs, bucket names and answers of the store."""
    return harmless(type(error).__name__.removesuffix("Error").lower() or "error", REASON_MAX_CHARS)
