"""Servers in the text of configuration files: one is added, the rest stays, and its removal restores the text."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_mcp.cli.config_text import ConfigFormat, Insertion, Json, Toml, Unparsable, value_at

SERVER = {"command": "/opt/evolink-mcp", "args": ["-P"], "env": {"EVOLINK_API_KEY": "sk-0123456789"}}
JSON_PATH = ("mcpServers", "evolink")
TOML_PATH = ("mcp_servers", "evolink")

JSON_TEXTS = {
    "empty file": "",
    "blank file": " \n\n",
    "only a comment": "// servers of the team\n",
    "empty object": "{}",
    "empty object with a line end": "{}\n",
    "empty object on two lines": "{\n}\n",
    "empty table": '{\n  "mcpServers": {}\n}\n',
    "empty table on two lines": '{\n  "mcpServers": {\n  }\n}\n',
    "another table": '{\n  "theme": "dark"\n}\n',
    "one server": '{\n  "mcpServers": {\n    "a": {\n      "command": "a"\n    }\n  }\n}\n',
    "tabs": '{\n\t"mcpServers": {\n\t\t"a": {"command": "a"}\n\t}\n}\n',
    "four blanks": '{\n    "x": [1, 2],\n    "mcpServers": {\n        "a": {"url": "http://127.0.0.1:1/mcp"}\n    }\n}',
    "one line": '{"mcpServers":{"a":{"command":"a"}},"x":1}',
    "one line with blanks": '{ "mcpServers": { "a": { "command": "a" } } }',
    "one line, empty table": '{"numStartups":3,"mcpServers":{}}',
    "one line, no table": '{"numStartups":3}',
    "line ends of Windows": '{\r\n  "mcpServers": {\r\n    "a": {"command": "C:\\\\a.exe"}\r\n  }\r\n}\r\n',
    "byte order mark": '\ufeff{\n  "mcpServers": {}\n}\n',
    "trailing comma": '{\n  "mcpServers": {\n    "a": {"command": "a"},\n  },\n}\n',
    "comment after the last server": '{\n  "mcpServers": {\n    "a": {"command": "a"} // mine, not {yours}\n  }\n}\n',
    "comment after the trailing comma": '{\n  "mcpServers": {\n    "a": 1, // mine\n  }\n}\n',
    "comment below the last server": '{\n  "mcpServers": {\n    "a": {"command": "a"}\n    // "b": {}\n  }\n}\n',
    "comment in an empty table": '{\n  "mcpServers": { /* none */ }\n}\n',
    "line comment in an empty table": '{\n  "mcpServers": { // none\n  }\n}\n',
    "comment before a brace": '{ /* one */ "mcpServers": { "a": 1 /* two */ } }',
    "comment that looks like a table": '// {"mcpServers": {}}\n{\n  // "evolink": {},\n  "mcpServers": {"a": 1}\n}\n',
    "names that look like the table": '{"x": {"mcpServers": 1}, "note": "\\"mcpServers\\": {}", "mcpServers": {"a": 1}}',
    "the table twice": '{"mcpServers": {"a": 1}, "mcpServers": {"b": 2}}',
    "other characters": '{"ключ": "図", "mcpServers": {"a": {"command": "ä"}}}',
}
TOML_TEXTS = {
    "empty file": "",
    "without a last line end": 'model = "x"',
    "one server": 'model = "x"\n\n[mcp_servers.a]\ncommand = "a" # mine\n',
    "two blank lines": '[mcp_servers.a]\ncommand = "a"\n\n\n',
    "line ends of Windows": "model = \"x\"\r\n\r\n[mcp_servers.a]\r\ncommand = 'C:\\a.exe'\r\n",
    "another table last": '[mcp_servers.a]\ncommand = "a"\n\n[tui]\n# colours\ntheme = "dark"\n',
    "text that looks like a table": 'note = """\n[mcp_servers.evolink]\n"""\nlist = [\n  [1],\n]\n',
    "strings with quotes": 'a = """"[b]"\n[c]"""""\nd = \'\'\'\n[mcp_servers.evolink]\'\'\'\ne = "\\"[" # ["x\n',
    "a comment last": '[tui]\ntheme = "dark"\n# the end',
    "array of tables": '[[hooks]]\nname = "a"\n\n[[hooks]]\nname = "b"\n',
}
CASES = [
    *(pytest.param(Json(), JSON_PATH, text, id=f"JSON, {name}") for name, text in JSON_TEXTS.items()),
    *(pytest.param(Toml(), TOML_PATH, text, id=f"TOML, {name}") for name, text in TOML_TEXTS.items()),
]


def remove(syntax: ConfigFormat, text: str, path: tuple[str, ...], insertion: Insertion) -> str:
    return syntax.remove(text, path, insertion.prefix, insertion.suffix, insertion.is_new_table)


@pytest.mark.parametrize(("syntax", "path", "text"), CASES)
def test_one_server_is_added_and_every_other_character_stays(
    syntax: ConfigFormat, path: tuple[str, ...], text: str
) -> None:
    insertion = syntax.add(text, path, SERVER)
    values = syntax.parse(insertion.text)
    assert value_at(values, path) == SERVER
    assert {**syntax.parse(text), path[0]: None} == {**values, path[0]: None}
    assert {**(value_at(syntax.parse(text), path[:1]) or {}), "evolink": SERVER} == values[path[0]]
    characters = iter(insertion.text)
    assert all(character in characters for character in text)  # the old text is a subsequence
    assert ("\r\n" in text) == ("\r\n" in insertion.text)
    assert not re.search(r"(?<!\r)\n", insertion.text) or "\r\n" not in text


@pytest.mark.parametrize(("syntax", "path", "text"), CASES)
def test_the_removal_restores_every_byte(syntax: ConfigFormat, path: tuple[str, ...], text: str) -> None:
    insertion = syntax.add(text, path, SERVER)
    restored_text = remove(syntax, insertion.text, path, insertion)
    if isinstance(syntax, Json) and not syntax.parse(text) and "{" not in text:
        assert syntax.parse(restored_text) == {}  # the caller restores an empty file
    else:
        assert restored_text == text


@pytest.mark.parametrize("text", [text for text in JSON_TEXTS.values() if "\n" in text and "mcpServers" in text])
def test_strict_json_stays_strict_json(text: str) -> None:
    try:
        json.loads(text)
    except ValueError:
        return
    json.loads(Json().add(text, JSON_PATH, SERVER).text)


def test_the_new_server_has_the_style_of_the_file() -> None:
    text = '{\n\t"mcpServers": {\n\t\t"a": {} // mine\n\t}\n}\n'
    assert Json().add(text, JSON_PATH, {"command": "e"}).text == (
        '{\n\t"mcpServers": {\n\t\t"a": {}, // mine\n\t\t"evolink": {\n\t\t\t"command": "e"\n\t\t}\n\t}\n}\n'
    )


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda text: text.replace('"theme": "dark"', '"theme": "light"'),
            '{\n  "theme": "light",\n  "mcpServers": {\n    "a": {}\n  }\n}\n',
        ),
        (
            lambda text: text.replace('\n    }\n  }\n}', '\n    },\n    "b": {} // new\n  }\n}'),
            '{\n  "theme": "dark",\n  "mcpServers": {\n    "a": {},\n    "b": {} // new\n  }\n}\n',
        ),
        (
            lambda text: text.replace('"command": "e"', '"command": "e", "timeout": 5'),
            '{\n  "theme": "dark",\n  "mcpServers": {\n    "a": {}\n  }\n}\n',
        ),
        (
            lambda text: text.replace('"a": {},\n', "// gone\n"),
            '{\n  "theme": "dark",\n  "mcpServers": {\n    // gone\n  }\n}\n',
        ),
        (
            lambda text: json.dumps(json.loads(text)) + "\n",
            '{"theme": "dark", "mcpServers": {"a": {}}}\n',
        ),
    ],
    ids=["another value", "a server after it", "the server itself", "the server before it", "a new format"],
)  # fmt: skip
def test_the_removal_keeps_later_edits_of_json(edit: Any, expected: str) -> None:
    text = '{\n  "theme": "dark",\n  "mcpServers": {\n    "a": {}\n  }\n}\n'
    insertion = Json().add(text, JSON_PATH, {"command": "e"})
    assert remove(Json(), edit(insertion.text), JSON_PATH, insertion) == expected


def test_a_table_that_was_added_too_stays_if_it_has_a_later_server() -> None:
    insertion = Json().add('{\n  "theme": "dark"\n}\n', JSON_PATH, {"command": "e"})
    edited_text = insertion.text.replace('"mcpServers": {\n', '"mcpServers": {\n    "b": {},\n')
    restored_text = remove(Json(), edited_text, JSON_PATH, insertion)
    assert restored_text == '{\n  "theme": "dark",\n  "mcpServers": {\n    "b": {}\n  }\n}\n'


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: text + "\n[tui]\na = 1\n", 'model = "x"\n\n[tui]\na = 1\n'),
        (lambda text: text + "# mine\n", 'model = "x"\n# mine\n'),
        (lambda text: text.replace('"x"', '"y"'), 'model = "y"'),
        (lambda text: text.replace("[mcp_servers.evolink]", '[ mcp_servers . "evolink" ]\nenabled = false'), 'model = "x"'),
        (lambda text: text + "\n# about b\n[mcp_servers.evolink2]\n", 'model = "x"\n\n# about b\n[mcp_servers.evolink2]\n'),
    ],
    ids=["a table after it", "a comment after it", "another value", "the server itself", "a similar name"],
)  # fmt: skip
def test_the_removal_keeps_later_edits_of_toml(edit: Any, expected: str) -> None:
    insertion = Toml().add('model = "x"', TOML_PATH, SERVER)
    assert remove(Toml(), edit(insertion.text), TOML_PATH, insertion) == expected


@pytest.mark.parametrize(
    ("syntax", "text", "message"),
    [
        (Json(), '{\n  "a": 1\n  "b": 2\n}', "line 3, column 3: expected , or }"),
        (Json(), '{"a": }', "line 1, column 7: expected a value"),
        (Json(), '{"a": 1', "line 1, column 8: expected , or }"),
        (Json(), "{'a': 1}", "line 1, column 2: expected a name in double quotes or }"),
        (Json(), "[]", "line 1, column 1: expected an object"),
        (Json(), "{} {}", "line 1, column 4: expected the end of the file"),
        (Json(), '{"a": /* open', "line 1, column 7: expected a value"),
        (Json(), '{"a": "\\x"}', "line 1, column 7: invalid string"),
        (Json(), '{"a" 1}', "line 1, column 6: expected :"),
        (Json(), '{"a": NaN}', "line 1, column 7: expected a value"),
        (Json(), '{"a": ' + "[" * 500, "line 1, column 207: too many levels"),
        (Json(), '{\n  "mcpServers": []\n}', "line 2, column 17: mcpServers is not an object"),
        (Json(), '{"mcpServers": null}', "line 1, column 16: mcpServers is not an object"),
        (Toml(), "a = 1\nb = \n", "line 2, column 5: Invalid value"),
        (Toml(), '[a]\nx = "', "line 2, column 6: Unterminated string"),
        (Toml(), 'mcp_servers = {a = {command = "a"}}\n', "line 2, column 1: mcp_servers is not written as"),
    ],
)  # fmt: skip
def test_an_invalid_text_is_refused_with_its_place(syntax: ConfigFormat, text: str, message: str) -> None:
    path = JSON_PATH if isinstance(syntax, Json) else TOML_PATH
    with pytest.raises(Unparsable) as refusal:
        syntax.add(text, path, SERVER)
    assert str(refusal.value).startswith(message)


BLANKS = st.sampled_from(["", " ", "\n", "\n  ", "\t", " // c\n", "/* , } */", "\r\n"])
NAMES = st.sampled_from(["a", "b", "mcpServers", 'q"\\', "ä", "//"])


@st.composite
def json_objects(draw: st.DrawFn, depth: int = 2) -> str:
    members: list[str] = []
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        if depth and (name == "mcpServers" or draw(st.booleans())):
            value = draw(json_objects(depth=depth - 1))
        elif name == "mcpServers":
            value = "{}"
        else:
            value = draw(st.sampled_from(["1", '"}"', "[1,]", "null", "[{}, 2]", "true"]))
        blanks = [draw(BLANKS) for _ in range(4)]
        members.append(f"{blanks[0]}{json.dumps(name)}{blanks[1]}:{blanks[2]}{value}{blanks[3]}")
    comma = "," if members and draw(st.booleans()) else ""
    return "{" + ",".join(members) + comma + draw(BLANKS) + "}"


@given(json_objects())
def test_any_json_with_comments_is_extended_and_restored(text: str) -> None:
    insertion = Json().add(text, JSON_PATH, SERVER)
    before = Json().parse(text)
    after = Json().parse(insertion.text)
    assert after.pop("mcpServers") == {**before.pop("mcpServers", {}), "evolink": SERVER}
    assert after == before
    assert remove(Json(), insertion.text, JSON_PATH, insertion) == text


def test_the_parser_returns_the_result_of_the_standard_library() -> None:
    values = {"a": [1, -2.5e3, True, None, '\u2028 \\ " ü'], "b": {"c": {}}, "": [[]]}
    for text in (json.dumps(values), json.dumps(values, indent=3), json.dumps(values, ensure_ascii=False)):
        assert Json().parse(text) == values
    assert Toml().parse('a = 1\n[b]\nc = "d"') == tomllib.loads('a = 1\n[b]\nc = "d"')
