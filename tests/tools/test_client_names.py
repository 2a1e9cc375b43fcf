"""The client's name in a session ID."""

from __future__ import annotations

import pytest

from evolink_mcp.tools.client_names import NAME_MAX_CHARS, client_name_in, new_session_id


@pytest.mark.parametrize("name", ["claude-code", "Visual Studio Code - Insiders", "Märchen 🦊", "."])
def test_a_session_id_contains_the_name_in_visible_ascii(name: str) -> None:
    session_id = new_session_id(name)
    assert client_name_in(session_id) == name
    assert all("!" <= char <= "~" for char in session_id)


@pytest.mark.parametrize("name", [None, 7, ["claude"], "", "\udcff"])
def test_a_name_that_is_no_text_is_left_out(name: object) -> None:
    assert client_name_in(new_session_id(name)) is None


@pytest.mark.parametrize("session_id", ["", "0123", "a.b", "a.%%", "a.\xff", "a._w=="])
def test_a_session_id_of_another_server_has_no_name(session_id: str) -> None:
    assert client_name_in(session_id) is None


def test_a_long_name_is_shortened_and_each_session_id_is_new() -> None:
    assert client_name_in(new_session_id("x" * 1_000)) == "x" * NAME_MAX_CHARS
    assert new_session_id("x") != new_session_id("x")
