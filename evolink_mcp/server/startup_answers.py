"""Answer the first requests of a stdio session from a recording while the server still imports the SDK.

`record()` asks the SDK for the results of all requests that sessions begin with. `save()` stores them in the user's cache
folder, and the next start reads them with `load()`. The key of a recording contains all versions and files that the
results depend on. A request of an unusual form is left to the SDK, which receives every line in any case.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress

from evolink_mcp import __version__

TYPE_CHECKING = False  # `typing` and `pathlib` take long to import
if TYPE_CHECKING:
    from typing import Any, TypeGuard

PACKAGES = ("mcp", "mcp_types", "pydantic")  # the outside packages that determine the results
LINE_MAX_BYTES = 1 << 16  # no request that is answered here is longer; the SDK answers the others
FILE_MAX_BYTES = 1 << 20
FILES_MAX = 8  # recordings of other versions and settings in the cache folder
BRACKETS_MAX = 100  # the transport reads 200 levels
INTEGER_MAX = 1 << 53

INITIALIZE = "initialize"
LISTS = ("tools/list", "prompts/list", "resources/templates/list")
# The SDK answers `initialize` with the same version only for these.
HANDSHAKES = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
MODERN = "2026-07-28"
ANY_OTHER = "*"  # stands for a protocol version that `initialize` does not know

_VERSION = "io.modelcontextprotocol/protocolVersion"
_CLIENT = "io.modelcontextprotocol/clientInfo"
_CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"

Results = Mapping[tuple[str, str], bytes]  # by method and protocol version: the result as JSON
RequestId = str | int
if TYPE_CHECKING:
    Object = dict[str, Any]
    Folder = str | os.PathLike[str]
    Serve = Callable[[Any, Any], Coroutine[Any, Any, None]]


class StartupAnswers:
    """Answer the lines of one client from recorded results, as long as they have the usual form.

    `answered` contains the IDs of these requests. The transport drops the SDK's answers to them.
    """

    def __init__(self, results: Results | None) -> None:
        self._results: Results = results or {}
        self._version: str | None = None  # the protocol version of the session, after its first request
        self._request_ids: set[RequestId] = set()
        self.answered: set[RequestId] = set()
        self._is_over = not self._results

    def answer(self, line: bytes) -> bytes | None:
        """Return the answer line, or None if the SDK must answer or the line needs no answer."""
        if self._is_over:
            return None
        message = _message(line)
        # The SDK may read such a line in another way, so it answers this line and all later ones.
        if message is None:
            self._is_over = True
            return None
        if "id" not in message:
            return None
        request_id = message["id"]
        method = message["method"]
        # The SDK decides whether a repeated or unusual ID is an error.
        if not _is_request_id(request_id) or request_id in self._request_ids:
            self._is_over = True
            return None
        self._request_ids.add(request_id)
        params = message.get("params", {})
        if self._version is None:
            self._version = _session_version(method, params)
            self._is_over = self._version is None
        elif method == INITIALIZE or not _is_usual(params, self._version):
            return None
        result = self._results.get((method, self._version or ""))
        # The SDK offers its newest handshake version to a client with an unknown one.
        if method == INITIALIZE and self._version and self._version not in HANDSHAKES:
            self._version = HANDSHAKES[-1]
            result = self._results.get((method, ANY_OTHER))
        if result is None:
            return None
        self.answered.add(request_id)
        encoded_id = json.dumps(request_id, ensure_ascii=False).encode()
        return b'{"jsonrpc":"2.0","id":' + encoded_id + b',"result":' + result + b"}\n"


# --- the recording on disk ---


def recording_key(tools_text: str) -> bytes:
    """Return one line with everything that the results depend on. `tools_text` is the setting of the published tools."""
    files = _files(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return "\t".join([*_versions(), *files, tools_text]).replace("\n", " ").encode("utf-8", "surrogatepass")


def load(folder: Folder, key: bytes) -> Results | None:
    """Read a recording. Return None for a missing or damaged file, and for one that another user could write."""
    with suppress(OSError, ValueError):
        checksum, stored_key, content = _read_private(_path(folder, key)).split(b"\n", 2)
        if stored_key == key and checksum == _checksum(content):
            return _results_in(content)
    return None


def save(folder: Folder, key: bytes, results: Results) -> None:
    """Write a recording, and delete the oldest ones beside it.

    Raises:
        OSError: the folder is not writable.
    """
    import tempfile
    from pathlib import Path

    folder = Path(folder)
    rows = [b"\t".join([method.encode(), version.encode(), result]) for (method, version), result in results.items()]
    content = b"\n".join(rows)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="part-", delete=False) as file:  # mode 0600
        file.write(b"\n".join([_checksum(content), key, content]))
    # Another server may read the recording at this moment.
    Path(file.name).replace(_path(folder, key))
    recordings = sorted(folder.glob("startup-*.tsv"), key=lambda path: path.stat().st_mtime)
    for old in recordings[:-FILES_MAX]:
        old.unlink(missing_ok=True)


def _path(folder: Folder, key: bytes) -> str:
    return os.path.join(folder, f"startup-{_checksum(key).decode()}.tsv")


def _checksum(content: bytes) -> bytes:
    """Return a checksum against damage. hashlib would take longer to import than the rest of this module."""
    return b"%08x" % zlib.crc32(content)


def _read_private(path: str) -> bytes:
    """Return the content of a file that only this user can write.

    Raises:
        OSError, ValueError: there is no such file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        # Another user could plant answers, for example a description that changes the behaviour of the model.
        is_private = sys.platform == "win32" or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
        if not stat.S_ISREG(status.st_mode) or not is_private or status.st_size > FILE_MAX_BYTES:
            raise ValueError(f"{path} is not a private file")
        return file.read()


def _results_in(content: bytes) -> Results:
    results: dict[tuple[str, str], bytes] = {}
    for row in content.splitlines():
        method, version, result = row.split(b"\t", 2)
        results[method.decode(), version.decode()] = result
    return results


def _versions() -> Iterator[str]:
    """Yield the versions of this package and of PACKAGES without an import of them."""
    yield f"evolink_mcp {__version__}"
    yield sys.version
    for folder in sys.path:
        with suppress(OSError):
            for name in sorted(os.listdir(folder or ".")):
                package, _, version = name.removesuffix(".dist-info").partition("-")
                if name.endswith(".dist-info") and package in PACKAGES:
                    yield f"{package} {version}"


def _files(folder: str) -> Iterator[str]:
    """Yield name, size and time of each file in a folder and below. Their content would take ten times as long."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name == "__pycache__":
                continue
            if entry.is_dir():
                yield entry.name
                yield from _files(entry.path)
            else:
                status = entry.stat()
                yield f"{entry.name} {status.st_size} {status.st_mtime_ns}"


# --- the recording itself ---


async def record(serve: Serve) -> Results:
    """Return the SDK's results for every protocol version. `serve(read_stream, write_stream)` runs one session."""
    results: dict[tuple[str, str], bytes] = {}
    client = {"name": "recorder", "version": "1"}
    for version in (*HANDSHAKES, ANY_OTHER):
        hello = {"protocolVersion": version, "capabilities": {}, "clientInfo": client}
        methods = () if version == ANY_OTHER else ("ping", *LISTS)
        requests: list[tuple[str, Object]] = [(INITIALIZE, hello), *((method, {}) for method in methods)]
        results |= {(method, version): result for method, result in await _ask(serve, requests)}
    envelope = {"_meta": {_VERSION: MODERN, _CLIENT: client, _CAPABILITIES: {}}}
    modern = [(method, envelope) for method in ("server/discover", *LISTS)]
    return results | {(method, MODERN): result for method, result in await _ask(serve, modern)}


async def _ask(serve: Serve, requests: list[tuple[str, Object]]) -> list[tuple[str, bytes]]:
    """Return each method with the SDK's result, from one session with these requests."""
    import anyio
    from mcp.shared.message import SessionMessage
    from mcp_types import JSONRPCRequest, JSONRPCResponse

    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](1)
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](1)
    results: list[tuple[str, bytes]] = []
    async with anyio.create_task_group() as group, from_server:
        group.start_soon(serve, from_client, to_client)
        async with to_server:
            for number, (method, params) in enumerate(requests):
                request = JSONRPCRequest(jsonrpc="2.0", id=number, method=method, params=params)
                await to_server.send(SessionMessage(request))
                message = (await from_server.receive()).message
                if not isinstance(message, JSONRPCResponse):
                    raise ValueError(f"the SDK refused {method}: {message}")
                line = message.model_dump_json(by_alias=True, exclude_unset=True).encode()
                prefix = b'{"jsonrpc":"2.0","id":%d,"result":' % number
                if not line.startswith(prefix):
                    raise ValueError(f"this version of the SDK writes answers in another order: {line[:80]!r}")
                results.append((method, line.removeprefix(prefix)[:-1]))
    return results


# --- the usual form of a request ---


def _session_version(method: object, params: object) -> str | None:
    """Return the protocol version that the first request of a session selects, or None for an unusual request."""
    if method == INITIALIZE:
        return _handshake_version(params)
    return MODERN if _is_usual(params, MODERN) else None


def _handshake_version(params: object) -> str | None:
    if not _is_object(params) or params.keys() != {"protocolVersion", "capabilities", "clientInfo"}:
        return None
    version = params["protocolVersion"]
    is_usual = _is_client(params["clientInfo"]) and _has_known_capabilities(params["capabilities"])
    return version if isinstance(version, str) and is_usual else None


def _is_usual(params: object, version: str) -> bool:
    """Return whether a request with these parameters asks for nothing special: the first page of a list."""
    if not _is_object(params) or params.keys() - {"_meta"}:
        return False
    meta = params.get("_meta", {})
    if not _is_object(meta):
        return False
    if "progressToken" in meta and not _is_request_id(meta["progressToken"]):
        return False
    required = {_VERSION, _CAPABILITIES} if version == MODERN else set[str]()
    if meta.keys() - {"progressToken", _CLIENT} != required:
        return False
    if version != MODERN:
        return _CLIENT not in meta
    is_known = meta[_VERSION] == MODERN and _has_known_capabilities(meta[_CAPABILITIES])
    return is_known and (_CLIENT not in meta or _is_client(meta[_CLIENT]))


def _is_client(value: object) -> bool:
    """Return whether a value describes a client: strings only, name and version among them."""
    if not _is_object(value):
        return False
    names = {"name", "version", "title", "description"}
    return {"name", "version"} <= value.keys() <= names and all(isinstance(text, str) for text in value.values())


def _has_known_capabilities(value: object) -> bool:
    """Return whether a value contains client capabilities in a form that each protocol version accepts."""
    checks: dict[str, Callable[[object], bool]] = {
        "roots": _is_roots,
        "sampling": lambda member: _is_nested_object(member, 2, {"context", "tools"}),
        "elicitation": lambda member: _is_nested_object(member, 2, {"form", "url"}),
        "experimental": lambda member: _is_nested_object(member, 2),
        "extensions": lambda member: _is_nested_object(member, 2),
    }
    return _is_object(value) and all(name in checks and checks[name](member) for name, member in value.items())


def _is_roots(value: object) -> bool:
    if not _is_object(value):
        return False
    return all(name == "listChanged" and isinstance(member, bool) for name, member in value.items())


def _is_nested_object(value: object, depth: int, names: set[str] | None = None) -> bool:
    """Return whether a value is an object of objects with `depth` levels. `names` limits the names of the first level."""
    if not _is_object(value) or (names is not None and value.keys() - names):
        return False
    return depth == 1 or all(_is_nested_object(member, depth - 1) for member in value.values())


def _is_request_id(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, str) or (isinstance(value, int) and abs(value) <= INTEGER_MAX)


def _message(line: bytes) -> Object | None:
    """Return the request or notification in a line. Return None for a line that the SDK could read differently."""
    # An escape can spell a lone surrogate, and `read_message` decides about those.
    if len(line) > LINE_MAX_BYTES or b"\\u" in line or line.count(b"{") + line.count(b"[") > BRACKETS_MAX:
        return None
    try:
        # From bytes, `json.loads` also decodes UTF-16 and the bytes of lone surrogates.
        value: object = json.loads(line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object_of)
    except (ValueError, RecursionError):
        return None
    if not _is_object(value):
        return None
    is_usual = value.keys() <= {"jsonrpc", "id", "method", "params"} and value.get("jsonrpc") == "2.0"
    return value if is_usual and isinstance(value.get("method"), str) else None


def _is_object(value: object) -> TypeGuard[Object]:
    """Return whether a decoded JSON value is an object."""
    return isinstance(value, dict)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _object_of(pairs: list[tuple[str, Any]]) -> Object:
    value = dict(pairs)
    # Readers of JSON disagree about the value of a repeated name.
    if len(value) != len(pairs):
        raise ValueError("a repeated name")
    return value
