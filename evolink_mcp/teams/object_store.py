"""Where a team's pictures lie: S3, Google Cloud Storage, Azure or a folder that all servers mount, and links to them."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, urlsplit

from evolink_mcp.errors import StoreUnusable
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.signing import Signer

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyStore

PATH = "/pictures/"
REMOTE = ("s3://", "gs://", "az://")
# A store that does not answer must not hold a call for long: the picture's link at EvoLink is there meanwhile.
ASKED_FOR_S = 20
REASON_SHOWN = 200  # characters
_SIGNED = re.compile(r"([0-9]{1,12})\.([0-9a-f]{64})/(.{1,1000})")


class Links:
    """Links below `public_url` to pictures of a folder, signed with the team's `secret`; each names the end of its life."""

    def __init__(self, public_url: str, secret: str) -> None:
        self._public_url = public_url.rstrip("/")
        self._signer = Signer(secret, "pictures")

    def to(self, name: str, until: float) -> str:
        """The link to this picture; it is good until `until`, in epoch seconds."""
        signature = self._signer.sign(f"{int(until)}.{name}")
        return f"{self._public_url}{PATH}{int(until)}.{signature}/{quote(name)}"

    def read(self, path: str, now: float) -> str | None:
        """The picture that this path was made for; None if it was not made here, or its time is over."""
        found = _SIGNED.fullmatch(path.removeprefix(PATH))
        if found is None:
            return None
        until, signature, name = int(found[1]), found[2], found[3]
        return name if self._signer.signed(f"{until}.{name}", signature) and now < until else None


class ObjectStore:
    """A store at `place`: an address of REMOTE, whose links the store signs, or an absolute folder, which needs `links`.

    A link lives for `link_hours`. The store is opened at its first use; its credentials are those of its own SDKs'
    environment variables.
    """

    def __init__(
        self, place: str, link_hours: float, links: Links | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._place, self._prefix = place, ""
        self._links = links
        if place.startswith(REMOTE):
            parts = urlsplit(place)  # older versions of obstore leave a prefix in the address out
            self._place, self._prefix = f"{parts.scheme}://{parts.netloc}", parts.path.strip("/")
            self._links = None
        self._link_s = link_hours * 3600
        self._clock = clock
        self._opened: AnyStore | None = None

    @property
    def is_folder(self) -> bool:
        """Whether its links lead to this team's servers, which have to answer them."""
        return self._links is not None

    async def put(self, name: str, file: Path, mime_type: str) -> None:
        """Store a picture under this name; the same name is the same picture.

        Raises:
            StoreUnusable: it cannot be stored now.
        """
        with _translated(reads=False):
            import obstore

            attributes: Any = {"Content-Type": mime_type} if self._place.startswith(REMOTE) else None
            await obstore.put_async(self._store, self._at(name), file, attributes=attributes)

    async def get(self, name: str, into: BinaryIO) -> int:
        """Write the picture to `into`; returns its size in bytes.

        Raises:
            StoreUnusable: it cannot be read now, or is gone.
        """
        written = 0
        async with self.reading(name) as (_, parts):
            async for part in parts:
                written += into.write(part)
        return written

    @asynccontextmanager
    async def reading(self, name: str) -> AsyncGenerator[tuple[int, AsyncGenerator[bytes]]]:
        """The picture's size in bytes and its content in parts.

        Raises:
            StoreUnusable: it cannot be read now, or is gone.
        """
        with _translated():
            import obstore

            found = await obstore.get_async(self._store, self._at(name))
        yield found.meta["size"], _parts(found)

    async def try_out(self) -> None:
        """Write something, read it, make a link to it and remove it.

        Raises:
            StoreUnusable: one of them does not work.
        """
        with _translated(reads=False):
            import obstore

            name = f"evolink-mcp-{uuid.uuid4().hex}"
            await obstore.put_async(self._store, self._at(name), b"evolink-mcp tries the store")
            await obstore.get_async(self._store, self._at(name))
            await self.link(name)
            await obstore.delete_async(self._store, self._at(name))

    async def link(self, name: str) -> tuple[str, float]:
        """A link by which anybody can fetch the picture, and when it ends, in epoch seconds.

        Raises:
            StoreUnusable: none can be made now.
        """
        until = self._clock() + self._link_s
        if self._links is not None:
            return self._links.to(name, until), until
        with _translated():
            import obstore

            store: Any = self._store
            return await obstore.sign_async(store, "GET", self._at(name), timedelta(seconds=self._link_s)), until

    def linked(self, path: str) -> str | None:
        """The picture that this path of the server is a valid link to, if it is one."""
        return None if self._links is None else self._links.read(path, self._clock())

    def _at(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @property
    def _store(self) -> AnyStore:
        if self._opened is None:
            from obstore.store import LocalStore, from_url

            if self._place.startswith(REMOTE):
                retry: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=ASKED_FOR_S)}
                self._opened = from_url(self._place, retry_config=retry)
            else:
                self._opened = LocalStore(prefix=self._place)
        return self._opened


@contextmanager
def _translated(*, reads: bool = True) -> Generator[None]:
    """What the store's library raises becomes StoreUnusable, which shows neither the place nor a credential."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError, NotImplementedError) as error:
        if not reads or not isinstance(error, FileNotFoundError):
            raise StoreUnusable(f"the store of pictures cannot be used ({_kind(error)})") from error
        raise StoreUnusable("the picture is not in the store any more", retryable=False) from error


def _kind(error: BaseException) -> str:
    """The library's name for the fault: its text may hold addresses, names of buckets and what the store answered."""
    return harmless(type(error).__name__.removesuffix("Error").lower() or "error", REASON_SHOWN)


async def _parts(found: Any) -> AsyncGenerator[bytes]:
    with _translated():
        async for part in found.stream():
            yield bytes(part)
