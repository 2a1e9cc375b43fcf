"""The key in the key store of the system, with a key store in a file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from child_processes import SERVER_COMMAND, minimal_environment
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

KEY = "sk-canary-0123456789abcdef"
NEW_KEY = "sk-canary-fedcba9876543210"


class Home:
    """A home folder with Cursor, and the commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store.json"
        self.config = folder / ".cursor" / "mcp.json"
        self.config.parent.mkdir()
        self.backend = "file_keyring.FileKeyring"

    def environment(self, key: str | None) -> dict[str, str]:
        return minimal_environment(
            self.folder,
            PYTHONPATH=str(Path(__file__).parent),
            PYTHON_KEYRING_BACKEND=self.backend,
            PYTHONUTF8="1",
            TEST_KEY_STORE=str(self.store),
            EVOLINK_MCP_DATA_DIR=str(self.folder / "data"),
            EVOLINK_BASE_URL="http://127.0.0.1:9",  # refuses every connection
            **({"EVOLINK_API_KEY": key} if key else {}),
        )

    def run(self, *arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        env = self.environment(key)
        command = [*SERVER_COMMAND, *arguments]
        process = subprocess.run(
            command,
            env=env,
            cwd=self.folder,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        assert KEY not in process.stdout + process.stderr
        return process

    def stored_keys(self) -> list[str]:
        return list(json.loads(self.store.read_text()).values())

    def server_environment(self) -> dict[str, str]:
        return json.loads(self.config.read_text())["mcpServers"]["evolink"]["env"]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def key_finding(home: Home) -> str:
    report = json.loads(home.run("doctor", "--json", key="keyring").stdout)
    return next(finding["verdict"] for finding in report["findings"] if finding["subject"] == "key")


def test_the_key_goes_into_the_key_store_and_undo_deletes_it(home: Home) -> None:
    assert home.run("install", "--yes", key=KEY).returncode == 0
    assert (home.stored_keys(), home.server_environment()) == ([KEY], {"EVOLINK_API_KEY": "keyring"})
    assert not any(
        KEY in path.read_text("utf-8", "replace") for path in home.folder.rglob("*.json") if path != home.store
    )
    assert key_finding(home) == "ok"
    assert home.run("install", "--yes", key=NEW_KEY).returncode == 0
    assert home.stored_keys() == [NEW_KEY]
    assert home.run("install", "--undo", "--yes").returncode == 0
    assert (home.stored_keys(), home.config.exists()) == ([], False)
    assert key_finding(home) == "broken"


def test_the_key_goes_into_the_file_on_request(home: Home) -> None:
    assert home.run("install", "--yes", "--key-in-file", key=KEY).returncode == 0
    assert (home.store.exists(), home.server_environment()) == (False, {"EVOLINK_API_KEY": KEY})


def test_the_key_of_plugins_is_stored_alone_and_deleted(home: Home) -> None:
    assert home.run("install", "--store-key", key=KEY).returncode == 0
    assert (home.stored_keys(), home.config.exists()) == ([KEY], False)
    assert home.run("install", "--store-key", "--undo").returncode == 0
    assert home.stored_keys() == []
    without_key = home.run("install", "--store-key")
    assert (without_key.returncode, without_key.stderr.startswith("evolink-mcp: set EVOLINK_API_KEY to the key")) == (
        2,
        True,
    )
    home.backend = "keyring.backends.fail.Keyring"
    without_store = home.run("install", "--store-key", key=KEY)
    assert (without_store.returncode, "this system has no key store" in without_store.stderr) == (1, True)


def test_without_a_key_store_the_key_goes_into_the_file(home: Home) -> None:
    home.backend = "keyring.backends.fail.Keyring"
    assert home.run("install", "--yes", key=KEY).returncode == 0
    assert home.server_environment() == {"EVOLINK_API_KEY": KEY}


def test_a_locked_key_store_changes_no_file_and_is_reported(home: Home) -> None:
    home.store.write_text("locked")
    result = home.run("install", "--yes", key=KEY)
    assert (result.returncode, home.config.exists()) == (1, False)
    assert result.stderr == (
        "evolink-mcp: the key store refuses the access (KeyringLocked); "
        "--key-in-file writes the key into the configuration\n"
    )
    assert key_finding(home) == "broken"


@pytest.mark.anyio
@pytest.mark.parametrize("is_stored", [True, False])
async def test_a_server_reads_the_key_from_the_key_store(home: Home, is_stored: bool) -> None:
    if is_stored:
        home.run("install", "--yes", key=KEY)
    env = home.environment("keyring")
    server = StdioServerParameters(command=SERVER_COMMAND[0], args=SERVER_COMMAND[1:], env=env, cwd=home.folder)
    async with Client(server) as client:
        answer = await client.call_tool("get_balance", {})
    text = " ".join(getattr(block, "text", "") for block in answer.content)
    assert answer.is_error
    assert ("The system's key store has no usable EvoLink key" in text) is not is_stored
    assert KEY not in text
