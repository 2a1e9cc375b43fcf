"""Add a server to the text of a configuration file and remove it again. Every other character stays.

JSON may have comments and trailing commas. A caller verifies each result: `parse` of the new text shows one change.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

# The reader is recursive: each level needs two of Python's 1,000 frames.
DEPTH_MAX = 200
DEFAULT_INDENT = "  "

_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
# Editors on Windows write a byte order mark.
_BLANKS = re.compile(r"[ \t\r\n\ufeff]*")
_COMMENT = re.compile(r"//[^\r\n]*|/\*.*?\*/", re.DOTALL)
_COMMENT_ON_LINE = re.compile(r"(?:[ \t]*/\*[^\r\n]*?\*/)*(?:[ \t]*//[^\r\n]*)?")


class Unparsable(ValueError):
    """The text is invalid, or a value has another type than the host needs. The message names line and column."""

    @classmethod
    def at(cls, text: str, position: int, reason: str) -> Unparsable:
        """Return the error for a position in `text`."""
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        return cls(f"line {line}, column {column}: {reason}")


@dataclass(frozen=True, slots=True)
class Insertion:
    """The new text, and the facts that `remove` needs to undo it exactly.

    `prefix` and `suffix` are the blanks that were inserted around the server. With `is_new_table` the table of all
    servers was inserted too.
    """

    text: str
    prefix: str
    suffix: str
    is_new_table: bool


class ConfigFormat(Protocol):
    """The syntax of a configuration file."""

    def parse(self, text: str) -> dict[str, Any]:
        """Return the values. A blank text has none. Raises Unparsable."""
        ...

    def add(self, text: str, path: Sequence[str], server: Mapping[str, Any]) -> Insertion:
        """Insert `server` at `path`, where no value is. Raises Unparsable."""
        ...

    def remove(self, text: str, path: Sequence[str], prefix: str, suffix: str, is_new_table: bool) -> str:
        """Remove the server at `path`. Raises Unparsable."""
        ...


def value_at(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return the value at `path`, or None if the path does not exist."""
    value: Any = values
    for name in path:
        if not isinstance(value, dict):
            return None
        value = cast("dict[str, Any]", value).get(name)
    return value


def without(values: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return a copy without the value at `path`, and without tables that are empty then."""
    remaining = copy.deepcopy(dict(values))
    table = value_at(remaining, path[:-1])
    if isinstance(table, dict):
        cast("dict[str, Any]", table).pop(path[-1], None)
        if not table and len(path) > 1:
            return without(remaining, path[:-1])
    return remaining


# --- JSON ---


@dataclass(frozen=True, slots=True)
class _Node:
    """A value and its place in the text. Only an object has `members`."""

    start: int
    end: int
    value: Any
    members: tuple[_Member, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    start: int
    node: _Node
    comma: int | None


class _JsonReader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def document(self) -> _Node | None:
        """Return the root, None for a text of blanks and comments."""
        self._skip()
        if self._position == len(self._text):
            return None
        root = self._node(0)
        self._skip()
        if self._position < len(self._text):
            raise self._error("expected the end of the file")
        if root.members is None:
            raise Unparsable.at(self._text, root.start, "expected an object")
        return root

    def _error(self, reason: str) -> Unparsable:
        return Unparsable.at(self._text, self._position, reason)

    def _skip(self) -> None:
        while True:
            self._position = self._match(_BLANKS).end()
            comment = _COMMENT.match(self._text, self._position)
            if comment is None:
                return
            self._position = comment.end()

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        match = pattern.match(self._text, self._position)
        if match is None:
            raise self._error("expected a value")
        return match

    def _next(self) -> str:
        self._skip()
        return self._text[self._position : self._position + 1]

    def _node(self, depth: int) -> _Node:
        if depth > DEPTH_MAX:
            raise self._error("too many levels")
        first = self._next()
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._array(depth)
        start = self._position
        token = self._match(_STRING if first == '"' else _SCALAR)
        self._position = token.end()
        try:
            return _Node(start, token.end(), json.loads(token[0]))
        except ValueError:
            raise Unparsable.at(self._text, start, "invalid string") from None

    def _object(self, depth: int) -> _Node:
        start = self._position
        self._position += 1
        members: list[_Member] = []
        while (first := self._next()) != "}":
            if first != '"':
                raise self._error("expected a name in double quotes or }")
            name = self._node(depth + 1)
            if self._next() != ":":
                raise self._error("expected :")
            self._position += 1
            node = self._node(depth + 1)
            comma = self._comma("}")
            members.append(_Member(name.value, name.start, node, comma))
        self._position += 1
        values = {member.name: member.node.value for member in members}
        return _Node(start, self._position, values, tuple(members))

    def _array(self, depth: int) -> _Node:
        start = self._position
        self._position += 1
        values: list[Any] = []
        while self._next() != "]":
            values.append(self._node(depth + 1).value)
            self._comma("]")
        self._position += 1
        return _Node(start, self._position, values)

    def _comma(self, end: str) -> int | None:
        """Read the comma after a value, or the end of the list. Return the place of the comma."""
        character = self._next()
        if character == ",":
            self._position += 1
            return self._position - 1
        if character != end:
            raise self._error(f"expected , or {end}")
        return None


class Json:
    """JSON with comments and trailing commas."""

    def parse(self, text: str) -> dict[str, Any]:
        """Return the values."""
        root = _JsonReader(text).document()
        return {} if root is None else root.value

    def add(self, text: str, path: Sequence[str], server: Mapping[str, Any]) -> Insertion:
        """Insert the server after the last one, in the style of the file."""
        root = _JsonReader(text).document()
        if root is None:
            return self._add_root(text, path, server)
        parent, depth = self._deepest(text, root, path)
        value: Any = dict(server)
        for name in reversed(path[depth + 1 :]):
            value = {name: value}
        return self._add_member(text, root, parent, path[depth], value, is_new_table=depth + 1 < len(path))

    def remove(self, text: str, path: Sequence[str], prefix: str, suffix: str, is_new_table: bool) -> str:
        """Remove the server with one comma."""
        root = _JsonReader(text).document()
        parents = [root]
        for name in path:
            members = parents[-1].members if parents[-1] is not None else None
            # Of two equal names the last one counts, as in JavaScript.
            match = [member for member in members or () if member.name == name]
            if not match:
                return text
            parents.append(match[-1].node)
        depth = len(path) - 1
        while is_new_table and depth > 0 and len(cast(_Node, parents[depth]).members or ()) == 1:
            depth -= 1
        members = cast(_Node, parents[depth]).members or ()
        index = max(i for i, member in enumerate(members) if member.name == path[depth])
        return _cut(text, members, index, prefix, suffix)

    def _deepest(self, text: str, root: _Node, path: Sequence[str]) -> tuple[_Node, int]:
        """Return the deepest object of `path` that exists, and its depth."""
        node = root
        for depth, name in enumerate(path[:-1]):
            match = [member for member in node.members or () if member.name == name]
            if not match:
                return node, depth
            node = match[-1].node
            if node.members is None:
                raise Unparsable.at(text, node.start, f"{name} is not an object")
        return node, len(path) - 1

    def _add_root(self, text: str, path: Sequence[str], server: Mapping[str, Any]) -> Insertion:
        value: Any = dict(server)
        for name in reversed(path):
            value = {name: value}
        newline = _newline_of(text)
        before = text if not text or text.endswith("\n") else text + newline
        document = _dumps(value, DEFAULT_INDENT, "", newline) + newline
        return Insertion(before + document, "", "", is_new_table=True)

    def _add_member(
        self, text: str, root: _Node, parent: _Node, name: str, value: Any, *, is_new_table: bool
    ) -> Insertion:
        newline = _newline_of(text)
        step = _indent_of(text, root.members[0].start) if root.members else None
        step = step or DEFAULT_INDENT
        members = parent.members
        if not members:
            inside = text[parent.start + 1 : parent.end - 1]
            outer = _line_indent(text, parent.start)
            # A file of one line stays one line.
            if "\n" not in text and not (parent is root and not inside.strip()):
                entry = f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
                return Insertion(_insert(text, {parent.start + 1: entry}), "", "", is_new_table)
            prefix = newline + outer + step
            suffix = "" if "\n" in inside else newline + outer
            entry = f"{json.dumps(name)}: {_dumps(value, step, outer + step, newline)}"
            return Insertion(_insert(text, {parent.start + 1: prefix + entry + suffix}), prefix, suffix, is_new_table)
        last = members[-1]
        indent = _indent_of(text, members[0].start)
        if indent is None:
            prefix = " " if text[: members[0].start].endswith((" ", "{")) else ""
            entry = f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
        else:
            prefix = newline + indent
            entry = f"{json.dumps(name)}: {_dumps(value, step, indent, newline)}"
        # If the last server has a trailing comma, the new one gets one too.
        own_comma = "" if last.comma is None else ","
        end = last.node.end if last.comma is None else last.comma + 1
        # A comment behind the last server belongs to it.
        comment = _COMMENT_ON_LINE.match(text, end)
        anchor = comment.end() if comment is not None else end
        # A line comment would hide a server on the same line.
        if indent is None and "//" in text[end:anchor]:
            prefix = newline
        pieces = {anchor: prefix + entry + own_comma}
        if last.comma is None:
            pieces[end] = "," + pieces.get(end, "")
        return Insertion(_insert(text, pieces), prefix, "", is_new_table)


def _cut(text: str, members: Sequence[_Member], index: int, prefix: str, suffix: str) -> str:
    member = members[index]
    start = member.start
    end = member.node.end
    # The user may have formatted the file since the installation.
    if text[:start].endswith(prefix):
        start -= len(prefix)
    else:
        start = len(text[:start].rstrip())
    # The suffix belongs to a server that is alone in its table.
    if len(members) == 1 and member.comma is None and text[end:].startswith(suffix):
        end += len(suffix)
    comma = member.comma
    if comma is None and index > 0:
        comma = members[index - 1].comma
    for first in (start, member.start):  # a line comment before the server needs its line end
        spans = [(first, end)] if comma is None else sorted([(first, end), (comma, comma + 1)])
        shorter = text
        for span_start, span_end in reversed(spans):
            shorter = shorter[:span_start] + shorter[span_end:]
        try:
            _JsonReader(shorter).document()
        except Unparsable:
            continue
        return shorter
    raise Unparsable.at(text, member.start, "the server cannot be removed")


def _insert(text: str, pieces: Mapping[int, str]) -> str:
    for position in sorted(pieces, reverse=True):
        text = text[:position] + pieces[position] + text[position:]
    return text


def _dumps(value: Any, step: str, indent: str, newline: str) -> str:
    lines = json.dumps(value, indent=step, ensure_ascii=False).split("\n")
    return (newline + indent).join(lines)


def _newline_of(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _line_indent(text: str, position: int) -> str:
    """Return the blanks at the start of a line."""
    start = text.rfind("\n", 0, position) + 1
    line = text[start:position]
    return line[: len(line) - len(line.lstrip(" \t"))]


def _indent_of(text: str, position: int) -> str | None:
    """Return the blanks before `position`, None if other text is on the line or the text has one line."""
    start = text.rfind("\n", 0, position) + 1
    blanks = text[start:position]
    return blanks if start and not blanks.strip(" \t") else None


# --- TOML ---

# Before Python 3.14 tomllib names the place of an error only in its message.
_TOML_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_HEADER = re.compile(r"[ \t]*\[[^\n]*(?:\n|\Z)")
_TOML_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?!")|' + r"'''.*?'''(?!')|" + r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'|#[^\n]*|[\[\]{}\n]",
    re.DOTALL,
)
_REMARK = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")


class Toml:
    """TOML. A server is a table with one level of tables below it."""

    def parse(self, text: str) -> dict[str, Any]:
        """Return the values."""
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            message = str(error)
            place = _TOML_PLACE.search(message)
            reason = message[: place.start()] if place else message
            if place and place[1]:
                raise Unparsable(f"line {place[1]}, column {place[2]}: {reason}") from None
            raise Unparsable.at(text, len(text), reason) from None

    def add(self, text: str, path: Sequence[str], server: Mapping[str, Any]) -> Insertion:
        """Append the server's tables to the file."""
        self.parse(text)
        newline = _newline_of(text)
        prefix = ""
        if text and not text.endswith("\n"):
            prefix = newline + newline
        elif text.strip() and not text.endswith(("\n\n", "\n\r\n")):
            prefix = newline
        block = toml_tables(path, server).replace("\n", newline) + newline
        longer = text + prefix + block
        try:
            self.parse(longer)
        # TOML allows no header below an inline table.
        except Unparsable as error:
            table = ".".join(path[:-1])
            raise Unparsable.at(text, len(text), f"{table} is not written as [{table}.NAME] tables") from error
        return Insertion(longer, prefix, "", is_new_table=False)

    def remove(self, text: str, path: Sequence[str], prefix: str, suffix: str, is_new_table: bool) -> str:
        """Remove the server's tables. A comment before the next table stays."""
        # The user may have written the names with quotes or blanks.
        quoted = r"[ \t]*\.[ \t]*".join(rf'["\']?{re.escape(name)}["\']?' for name in path)
        own_header = re.compile(rf"[ \t]*\[[ \t]*{quoted}[ \t]*[.\]]")
        expected = without(self.parse(text), path)
        while own := next((header for header in _headers(text) if own_header.match(header[0])), None):
            after = (header for header in _headers(text) if header.start() > own.start())
            following = [header for header in after if not own_header.match(header[0])]
            end = following[0].start() if following else len(text)
            lines = text[own.end() : end].splitlines(keepends=True)
            while lines and _REMARK.fullmatch(lines[-1].replace("\r\n", "\n")):
                lines.pop()
            start = own.start()
            if text[:start].endswith(prefix):
                start -= len(prefix)
            head = text[:start]
            tail = text[own.end() + len("".join(lines)) :]
            # The line before the server may have got its end from `add`.
            joint = _newline_of(text) if head and tail and not head.endswith("\n") else ""
            text = head + joint + tail
        if without(self.parse(text), path) != expected or value_at(self.parse(text), path) is not None:
            raise Unparsable.at(text, 0, f"remove the table {'.'.join(path)} with an editor")
        return text


def _headers(text: str) -> Iterator[re.Match[str]]:
    """Yield the header line of each table of a valid text. A bracket in a string or a list starts no table."""
    depth = 0
    line = 0
    for token in _TOML_TOKEN.finditer(text):
        if token[0] == "\n":
            line = token.end()
        elif token[0] in "[{":
            if depth == 0 and not text[line : token.start()].strip(" \t") and (header := _HEADER.match(text, line)):
                yield header
            depth += 1
        elif token[0] in "]}":
            depth -= 1


def toml_tables(path: Sequence[str], server: Mapping[str, Any]) -> str:
    """Return the tables of a server as TOML, without a line end."""
    name = ".".join(path)
    # Strings, numbers and lists of strings have the same form in JSON and TOML.
    lines = [f"[{name}]"]
    lines += [f"{key} = {_compact(value)}" for key, value in server.items() if not isinstance(value, dict)]
    for key, value in server.items():
        if isinstance(value, dict):
            table = cast("dict[str, Any]", value)
            lines += ["", f"[{name}.{key}]", *(f"{inner} = {_compact(text)}" for inner, text in table.items())]
    return "\n".join(lines)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
