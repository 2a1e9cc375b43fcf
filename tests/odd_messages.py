"""Messages that no client should send: every kind of odd value in every field of a message, in both protocol eras."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

INITIALIZE: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": "hello",
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "odd", "version": "1"}},
}
ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "odd", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
DISCOVER: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": "hello",
    "method": "server/discover",
    "params": {"_meta": ENVELOPE},
}
FIRST_MESSAGES = {"legacy": INITIALIZE, "modern": DISCOVER}


@dataclass(frozen=True, slots=True)
class Value:
    """One odd value as bytes.

    `echo` is the ID of the error if the value is the ID of a request. `is_id`: the value is a good ID. `is_json`: stdio
    reads it. `hides_id`: no ID can be read from a message that holds it. `is_params`: it may be the params of a message.
    """

    data: bytes
    echo: Any = None
    is_id: bool = False
    is_json: bool = True
    hides_id: bool = False
    is_params: bool = False


def nested(opening: bytes, inner: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + inner + closing * depth


VALUES = {
    "the bytes of a lone surrogate": Value(b'"\xed\xa0\x80"'),
    "an escaped lone surrogate": Value(b'"\\ud800"'),
    "an escaped low surrogate in a text": Value(b'"ok \\udc00 end"'),
    "a byte that is not UTF-8": Value(b'"\xff"', is_json=False),
    "an overlong NUL": Value(b'"\xc0\x80"', is_json=False),
    "a control character": Value(b'"\x01"', is_json=False, hides_id=True),
    "an escaped NUL": Value(b'"\\u0000"', echo="\0", is_id=True),
    "an empty text": Value(b'""', echo="", is_id=True),
    "a long text": Value(b'"' + b"x" * 70_000 + b'"', echo="x" * 70_000, is_id=True),
    "digits as text": Value(b'"0007"', echo="0007", is_id=True),
    "null": Value(b"null", is_params=True),
    "true": Value(b"true", echo=True),
    "false": Value(b"false", echo=False),
    "a negative number": Value(b"-1", echo=-1, is_id=True),
    "a fraction": Value(b"1.5", echo=1.5),
    "a whole number as a fraction": Value(b"7.0", echo=7.0),
    "minus zero": Value(b"-0.0", echo=-0.0),
    "an exponent": Value(b"1e2", echo=100.0),
    "a number above all floats": Value(b"1e400"),
    "a number below all floats": Value(b"-1e400"),
    "NaN": Value(b"NaN"),
    "Infinity": Value(b"Infinity"),
    "-Infinity": Value(b"-Infinity"),
    "400 digits": Value(b"9" * 400, echo=int("9" * 400), is_id=True),
    "5,000 digits": Value(b"9" * 5_000, is_json=False, hides_id=True),
    "an empty list": Value(b"[]"),
    "a list": Value(b"[1]"),
    "an empty object": Value(b"{}", is_params=True),
    "an object": Value(b'{"a":[{}]}', is_params=True),
    "an object with a member twice": Value(b'{"a":1,"a":2}', is_params=True),
    "lists in 150 lists": Value(nested(b"[", b"", b"]", 150)),
    "objects in 150 objects": Value(nested(b'{"a":', b"1", b"}", 150), is_params=True),
    "lists in 300 lists": Value(nested(b"[", b"", b"]", 300), is_json=False),
    "a surrogate in 300 lists": Value(nested(b"[", b'"\\ud800"', b"]", 300), is_json=False),
    "lists in 100,000 lists": Value(nested(b"[", b"", b"]", 100_000), is_json=False, hides_id=True),
    "half an object": Value(b'{"a":', is_json=False, hides_id=True),
    "nothing": Value(b"", is_json=False, hides_id=True),
}

_META = json.dumps(ENVELOPE).encode()
_CALL = b'{"jsonrpc":"2.0","id":%(id)b,"method":"tools/call","params":{"name":"compute_size","arguments":{"size":"3:2"},"_meta":{'
_TRACED = b'"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",'


def _request(method: str, params: bytes) -> bytes:
    return b'{"jsonrpc":"2.0","id":%%(id)b,"method":"%b","params":{%b}}' % (method.encode(), params)


def _envelope(odd: str) -> bytes:
    """Return the envelope of 2026-07-28 with an odd value in one member."""
    members = [b'"%b":%b' % (name.encode(), b"%(value)b" if name == odd else json.dumps(value).encode())
               for name, value in ENVELOPE.items()]  # fmt: skip
    return b'"_meta":{' + b",".join(members) + b"}"


# Each form is a request with an ID. It gets one answer with every odd value.
REQUESTS = {
    "method": b'{"jsonrpc":"2.0","id":%(id)b,"method":%(value)b}',
    "jsonrpc": b'{"jsonrpc":%(value)b,"id":%(id)b,"method":"ping"}',
    "params": b'{"jsonrpc":"2.0","id":%(id)b,"method":"tools/list","params":%(value)b}',
    "another member": b'{"jsonrpc":"2.0","id":%(id)b,"method":"ping","more":%(value)b}',
    "a result beside the method": b'{"jsonrpc":"2.0","id":%(id)b,"method":"ping","result":%(value)b}',
    "_meta": _request("tools/list", b'"_meta":%(value)b'),
    "progressToken": _CALL + b'"progressToken":%(value)b}}}',
    "traceparent": _CALL + b'"traceparent":%(value)b}}}',
    "tracestate": _CALL + _TRACED + b'"tracestate":%(value)b}}}',
    "baggage": _CALL + _TRACED + b'"baggage":%(value)b}}}',
    "the name of a tool": _request("tools/call", b'"name":%(value)b,"arguments":{}'),
    "arguments": _request("tools/call", b'"name":"compute_size","arguments":%(value)b'),
    "an argument": _request("tools/call", b'"name":"compute_size","arguments":{"size":%(value)b}'),
    "the prompt of a purchase": _request("tools/call", b'"name":"generate_image","arguments":{"prompt":%(value)b}'),
    "protocolVersion": _request(
        "initialize", b'"protocolVersion":%(value)b,"capabilities":{},"clientInfo":{"name":"odd","version":"1"}'
    ),
    "capabilities": _request(
        "initialize", b'"protocolVersion":"2025-11-25","capabilities":%(value)b,"clientInfo":{"name":"odd","version":"1"}'
    ),
    "clientInfo": _request("initialize", b'"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":%(value)b'),
    "the name of a client": _request(
        "initialize", b'"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":%(value)b,"version":"1"}'
    ),
    **{f"envelope {name.partition('/')[2]}": _request("server/discover", _envelope(name)) for name in ENVELOPE},
    "arguments in an envelope": _request(
        "tools/call", b'"name":"compute_size","arguments":%(value)b,"_meta":' + _META
    ),
    "requestState": _request(
        "tools/call", b'"name":"generate_image","arguments":{},"requestState":%(value)b,"_meta":' + _META
    ),
    "a task": _request("tasks/get", b'"taskId":%(value)b,"_meta":' + _META),
    "a cursor": _request("tools/list", b'"cursor":%(value)b'),
    "a URI": _request("resources/read", b'"uri":%(value)b'),
    "the name of a prompt": _request("prompts/get", b'"name":%(value)b'),
    "the arguments of a prompt": _request("prompts/get", b'"name":"new_picture","arguments":%(value)b'),
    "a reference to complete": _request("completion/complete", b'"ref":%(value)b,"argument":{"name":"a","value":"b"}'),
    "a log level": _request("logging/setLevel", b'"level":%(value)b'),
    "a cancellation with an id": _request("notifications/cancelled", b'"requestId":%(value)b'),
}  # fmt: skip

# Each form is a notification. It gets no answer if its odd value is JSON.
NOTIFICATIONS = {
    "a cancelled requestId": b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%(value)b}}',
    "the reason of a cancellation": (
        b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"none","reason":%(value)b}}'
    ),
    "a reported progressToken": (
        b'{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":%(value)b,"progress":1}}'
    ),
    "a reported progress": (
        b'{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":%(value)b}}'
    ),
    "_meta of a notification": b'{"jsonrpc":"2.0","method":"notifications/initialized","params":{"_meta":%(value)b}}',
}

# Each form is a notification. It gets no answer if its odd value is good as params.
WITH_ODD_PARAMS = {
    "params of a cancellation": b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":%(value)b}',
    "params of a progress": b'{"jsonrpc":"2.0","method":"notifications/progress","params":%(value)b}',
}

# Each form has an odd ID. The error contains it if JSON can carry it.
ODD_IDS = {
    "id": b'{"jsonrpc":"2.0","id":%(value)b,"method":"ping"}',
    "id of a list": b'{"jsonrpc":"2.0","id":%(value)b,"method":"tools/list","params":{}}',
    "id with an escaped name": b'{"jsonrpc":"2.0","\\u0069d":%(value)b,"method":"ping"}',
}


@dataclass(frozen=True, slots=True)
class Case:
    """A line. Over stdio it gets one answer with `request_id`, or no answer if `is_silent`.

    `is_error`: the answer is -32600 or -32700.
    """

    line: bytes
    request_id: Any = None
    is_silent: bool = False
    is_error: bool = False


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for kind, value in VALUES.items():
        for field, form in REQUESTS.items():
            name = f"{field}: {kind}"
            line = form % {b"id": json.dumps(name).encode(), b"value": value.data}
            is_good = {
                "jsonrpc": False,
                "method": value.data.startswith(b'"'),
                "params": value.is_params,
            }.get(field, True)
            cases[name] = Case(line, None if value.hides_id else name, is_error=not (value.is_json and is_good))
        for field, form in NOTIFICATIONS.items():
            line = form % {b"value": value.data}
            cases[f"{field}: {kind}"] = Case(line, is_silent=value.is_json, is_error=not value.is_json)
        for field, form in WITH_ODD_PARAMS.items():
            line = form % {b"value": value.data}
            cases[f"{field}: {kind}"] = Case(line, is_silent=value.is_params, is_error=not value.is_params)
        for field, form in ODD_IDS.items():
            if value.is_id and field != "id":
                continue  # an ID may be used once, until it has its answer
            line = form % {b"value": value.data}
            cases[f"{field}: {kind}"] = Case(line, value.echo, is_error=not value.is_id)
        cases[f"the whole line: {kind}"] = Case(value.data, is_error=True, is_silent=value.data == b"")
        answer = b'{"jsonrpc":"2.0","id":%b,"result":{}}' % value.data
        cases[f"id of a result: {kind}"] = Case(answer, is_silent=value.is_id, is_error=not value.is_id)
    return {**cases, **_MORE}


_MORE = {
    "a batch": Case(b'[{"jsonrpc":"2.0","id":"batch","method":"ping"}]', is_error=True),
    "UTF-16": Case('{"jsonrpc":"2.0","id":"wide","method":"ping"}'.encode("utf-16-le"), is_error=True),
    "a byte order mark": Case(b'\xef\xbb\xbf{"jsonrpc":"2.0","id":"mark","method":"ping"}', "mark"),
    "an id twice": Case(b'{"jsonrpc":"2.0","id":"first","id":"second","method":"ping"}', "second"),
    "a good and a bad id": Case(b'{"jsonrpc":"2.0","id":"good","id":[],"method":"ping"}', is_error=True),
    "an old version": Case(b'{"jsonrpc":"1.0","id":"old","method":"ping"}', "old", is_error=True),
    "no version": Case(b'{"id":"no version","method":"ping"}', "no version", is_error=True),
    "no method": Case(b'{"jsonrpc":"2.0","id":"no method"}', "no method", is_error=True),
    "a misspelt method": Case(b'{"jsonrpc":"2.0","id":"misspelt","metho":"ping"}', "misspelt", is_error=True),
    "a cancellation of nothing": Case(b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{}}', is_silent=True),
    "a cancellation without params": Case(b'{"jsonrpc":"2.0","method":"notifications/cancelled"}', is_silent=True),
    "an unknown notification": Case(b'{"jsonrpc":"2.0","method":"notifications/unknown"}', is_silent=True),
    "an unknown method": Case(b'{"jsonrpc":"2.0","id":"unknown","method":"unknown"}', "unknown"),
    "a result for nothing": Case(b'{"jsonrpc":"2.0","id":999,"result":{}}', is_silent=True),
    "an error for nothing": Case(b'{"jsonrpc":"2.0","id":999,"error":{"code":1,"message":"x"}}', is_silent=True),
    "an error without an id": Case(b'{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"x"}}', is_silent=True),
    "a result that is no object": Case(b'{"jsonrpc":"2.0","id":999,"result":7}', is_error=True),
    "an error that is no object": Case(b'{"jsonrpc":"2.0","id":999,"error":"x"}', is_error=True),
    "a blank line": Case(b" \t\r", is_silent=True),
}  # fmt: skip

CASES = _cases()


def proofs(era: str, number: int) -> dict[str, dict[str, Any]]:
    """Return good requests by their IDs, which no other message has. Each must get a result."""
    methods: dict[str, dict[str, Any]] = {
        "ping" if era == "legacy" else "server/discover": {},
        "tools/list": {},
        "tools/call": {"name": "compute_size", "arguments": {"size": "3:2"}},
    }
    envelope = {} if era == "legacy" else {"_meta": ENVELOPE}
    return {
        f"proof {number} {method}": {
            "jsonrpc": "2.0",
            "id": f"proof {number} {method}",
            "method": method,
            "params": {**params, **envelope},
        }
        for method, params in methods.items()
    }


# --- generated messages ---

_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
_SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | _TEXT
_JSON = st.recursive(
    _SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=8
)
_METHODS = st.sampled_from(
    "initialize ping tools/list tools/call prompts/list prompts/get resources/list resources/read resources/templates/list "
    "completion/complete logging/setLevel server/discover tasks/get notifications/initialized notifications/cancelled "
    "notifications/progress notifications/roots/list_changed".split()
)
_META_OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "progressToken": _JSON,
        "traceparent": _JSON,
        "tracestate": _JSON,
        "baggage": _JSON,
        **{name: st.just(value) | _JSON for name, value in ENVELOPE.items()},
    },
)
_PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "_meta": _META_OBJECTS | _JSON,
        "name": st.sampled_from(["compute_size", "generate_image", "get_task", "list_tasks", "new_picture"]) | _JSON,
        "arguments": st.dictionaries(st.sampled_from(["size", "prompt", "n", "task_id"]), _JSON, max_size=3) | _JSON,
        "requestId": _JSON,
        "progressToken": _JSON,
        "progress": _JSON,
        "cursor": _JSON,
        "protocolVersion": st.sampled_from(["2025-11-25", "2026-07-28"]) | _JSON,
        "capabilities": st.just({}) | _JSON,
        "clientInfo": st.just({"name": "odd", "version": "1"}) | _JSON,
        "uri": _JSON,
    },
)
_MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | st.just("2.0") | _JSON,
        "id": st.integers(0, 3) | _JSON,
        "method": _METHODS | _JSON,
        "params": _PARAMS | _JSON,
        "result": _JSON,
        "error": st.fixed_dictionaries({"code": _JSON, "message": _JSON}) | _JSON,
    },
)


def _encoded(message: Any, is_ascii: bool) -> bytes:
    return json.dumps(message, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass").replace(b"\n", b" ")


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """Draw a message with some bytes that are changed or missing."""
    line = bytearray(_encoded(draw(_MESSAGES), draw(st.booleans())))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(line)))
        line[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(line).replace(b"\n", b" ")


LINES = st.builds(_encoded, _MESSAGES | _JSON, st.booleans()) | _damaged() | st.sampled_from(
    [case.line for case in CASES.values() if len(case.line) < 1_000]
)  # fmt: skip
