"""The first answers of a session from a recording: a host need not wait until the SDK is imported.

`startup_answers.tsv` holds what the SDK answered to the requests that every session begins with. It is used only with the
versions that it was recorded with; whatever has an unusual form is left to the SDK, which gets every line in any case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, cast

from evolink_mcp import __version__

RECORDING = Path(__file__).with_name("startup_answers.tsv")
PACKAGES = ("mcp", "mcp_types", "pydantic")  # what the answers depend on, beside this package
LINE_MAX_BYTES = 1 << 16
INTEGER_MAX = 1 << 53

INITIALIZE = "initialize"
LISTS = ("tools/list", "prompts/list", "resources/templates/list")
HANDSHAKES = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
MODERN = "2026-07-28"
ANY_OTHER = "*"  # what `initialize` answers to a version that it does not know

_VERSION = "io.modelcontextprotocol/protocolVersion"
_CLIENT = "io.modelcontextprotocol/clientInfo"
_CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"

Object = dict[str, Any]
Answers = Mapping[tuple[str, str], bytes]  # by method and protocol version: the result, as JSON
RequestId = str | int
Serve = Callable[[Any, Any], Coroutine[Any, Any, None]]


class Opening:
    """Answers one client's lines from `answers`, as long as they are what every client says.

    `answered` has the ids of what was answered: the SDK will answer them once more, and nobody may hear that.
    """

    def __init__(self, answers: Answers | None) -> None:
        self._answers: Answers = answers or {}
        self._version: str | None = None  # the protocol version, once the first request has told it
        self._seen: set[RequestId] = set()
        self.answered: set[RequestId] = set()
        self._over = not self._answers

    def answer(self, line: bytes) -> bytes | None:
        """The line that answers this one; None if the SDK has to, or if it needs no answer."""
        if self._over:
            return None
        said = _message(line)
        if said is None:
            self._over = True
            return None
        if "id" not in said:
            return None
        name, method = said["id"], said["method"]
        if not _is_id(name) or name in self._seen:
            self._over = True
            return None
        self._seen.add(name)
        params = said.get("params", {})
        if self._version is None:
            self._version = _opened(method, params)
            self._over = self._version is None
        elif method == INITIALIZE or not _is_usual(params, self._version):
            return None
        result = self._answers.get((method, self._version or ""))
        if method == INITIALIZE and self._version and self._version not in HANDSHAKES:
            self._version, result = HANDSHAKES[-1], self._answers.get((method, ANY_OTHER))
        if result is None:
            return None
        self.answered.add(name)
        shown = json.dumps(name, ensure_ascii=False).encode()
        return b'{"jsonrpc":"2.0","id":' + shown + b',"result":' + result + b"}\n"


def recorded(path: Path = RECORDING) -> Answers | None:
    """The answers in a recording; None if it was made with other versions, or cannot be read."""
    try:
        first, *rows = path.read_bytes().splitlines()
    except (OSError, ValueError):
        return None
    if first.decode(errors="replace") != versions():
        return None
    answers: dict[tuple[str, str], bytes] = {}
    for row in rows:
        method, protocols, result = row.split(b"\t", 2)
        for protocol in protocols.decode().split():
            answers[method.decode(), protocol] = result
    return answers


def versions() -> str:
    """The versions of this package and of what its answers depend on. Nothing is imported for it."""
    import os

    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            package, _, version = name.removesuffix(".dist-info").partition("-")
            if name.endswith(".dist-info") and package in PACKAGES:
                found.setdefault(package, version)
    return " ".join([f"evolink_mcp {__version__}", *(f"{name} {found.get(name, '?')}" for name in PACKAGES)])


async def record(serve: Serve) -> bytes:
    """The content of `startup_answers.tsv`: what the SDK answers in every version of the protocol.

    `serve(read_stream, write_stream)` runs a session of the server.
    """
    rows: dict[tuple[str, bytes], list[str]] = {}
    client = {"name": "recorder", "version": "1"}
    for version in (*HANDSHAKES, ANY_OTHER):
        hello = {"protocolVersion": version, "capabilities": {}, "clientInfo": client}
        methods: list[str] = [] if version == ANY_OTHER else ["ping", *LISTS]
        asked: list[tuple[str, Object]] = [(INITIALIZE, hello), *((method, {}) for method in methods)]
        for method, result in await _asked(serve, asked):
            rows.setdefault((method, result), []).append(version)
    envelope = {"_meta": {_VERSION: MODERN, _CLIENT: client, _CAPABILITIES: {}}}
    for method, result in await _asked(serve, [(method, envelope) for method in ("server/discover", *LISTS)]):
        rows.setdefault((method, result), []).append(MODERN)
    lines = [
        b"\t".join([method.encode(), " ".join(protocols).encode(), result])
        for (method, result), protocols in rows.items()
    ]
    return b"\n".join([versions().encode(), *lines, b""])


async def _asked(serve: Serve, requests: list[tuple[str, Object]]) -> list[tuple[str, bytes]]:
    """Each method with the result that the SDK writes, in a session of these requests."""
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
                results.append((method, line.removeprefix(b'{"jsonrpc":"2.0","id":%d,"result":' % number)[:-1]))
    return results


def _opened(method: object, params: object) -> str | None:
    """The protocol version that a session's first request opens; None if it is no usual opening."""
    if method == INITIALIZE:
        return _shaken(params)
    return MODERN if _is_usual(params, MODERN) else None


def _shaken(params: object) -> str | None:
    if not isinstance(params, dict):
        return None
    said = cast("Object", params)
    version = said.get("protocolVersion")
    usual = said.keys() == {"protocolVersion", "capabilities", "clientInfo"} and isinstance(version, str)
    usual = usual and _is_client(said["clientInfo"]) and _are_capabilities(said["capabilities"])
    return version if usual else None


def _is_usual(params: object, version: str) -> bool:
    """Whether these are the parameters of a request that asks for nothing special: the first page of a list."""
    if not isinstance(params, dict):
        return False
    said = cast("Object", params)
    if said.keys() - {"_meta"}:
        return False
    meta = said.get("_meta", {})
    if not isinstance(meta, dict):
        return False
    meta = cast("Object", meta)
    if "progressToken" in meta and not _is_id(meta["progressToken"]):
        return False
    needed = {_VERSION, _CAPABILITIES} if version == MODERN else set[str]()
    if meta.keys() - {"progressToken", _CLIENT} != needed:
        return False
    if version != MODERN:
        return _CLIENT not in meta
    usual = meta[_VERSION] == MODERN and _are_capabilities(meta[_CAPABILITIES])
    return usual and (_CLIENT not in meta or _is_client(meta[_CLIENT]))


def _is_client(value: object) -> bool:
    """Whether this names a client: texts only, its name and version among them."""
    if not isinstance(value, dict):
        return False
    said = cast("Object", value)
    texts = {"name", "version", "title", "description"}
    return {"name", "version"} <= said.keys() <= texts and all(isinstance(text, str) for text in said.values())


def _are_capabilities(value: object) -> bool:
    """Whether these are a client's capabilities in a form that every version of the protocol takes."""
    levels: dict[str, Callable[[object], bool]] = {
        "roots": lambda one: (
            isinstance(one, dict)
            and all(key == "listChanged" and isinstance(on, bool) for key, on in cast("Object", one).items())
        ),
        "sampling": lambda one: _are_objects(one, 2, {"context", "tools"}),
        "elicitation": lambda one: _are_objects(one, 2, {"form", "url"}),
        "experimental": lambda one: _are_objects(one, 2),
        "extensions": lambda one: _are_objects(one, 2),
    }
    if not isinstance(value, dict):
        return False
    return all(key in levels and levels[key](one) for key, one in cast("Object", value).items())


def _are_objects(value: object, depth: int, names: set[str] | None = None) -> bool:
    """Whether this is an object of objects, `depth` levels of them, with these names at most."""
    if not isinstance(value, dict):
        return False
    said = cast("Object", value)
    if names is not None and said.keys() - names:
        return False
    return depth == 1 or all(_are_objects(one, depth - 1) for one in said.values())


def _is_id(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, str) or (isinstance(value, int) and abs(value) <= INTEGER_MAX)


def _message(line: bytes) -> Object | None:
    """The line as a request or a notification; None for everything else, and for what the SDK may read differently."""
    if len(line) > LINE_MAX_BYTES or b"\\u" in line:
        return None
    try:
        said: object = json.loads(line, parse_constant=_refuse, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    message = cast("Object", said)
    usual = message.keys() <= {"jsonrpc", "id", "method", "params"} and message.get("jsonrpc") == "2.0"
    return message if usual and isinstance(message.get("method"), str) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> Object:
    said = dict(pairs)
    if len(said) != len(pairs):
        raise ValueError("a name is repeated")
    return said
