"""The doctor finds what is wrong, changes nothing, shows nothing of the key; and its blocks are what hosts read."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvicorn
from blocking import BlockingJournal
from child_processes import SERVER_COMMAND, minimal_environment

from evolink_mcp.app.values import EXAMPLE_KEY
from evolink_mcp.cli import doctor
from evolink_mcp.cli.doctor import Finding, Probe, Report
from evolink_mcp.cli.host_config import KEY_INPUT, Block, host_blocks, installed_command
from evolink_mcp.journal.entry import Entry, new_key
from evolink_mcp.journal.file import FILE_NAME
from evolink_mcp.journal.sqlite import read_entries
from evolink_mcp.simulator.app import Simulator

KEY = "sk-canary-0123456789abcdef"
COMMAND, ARGS = "/opt/my tools/evolink-mcp", ["--verbose"]
ENV = {"EVOLINK_API_KEY": "sk-...", "EVOLINK_MCP_PREVIEW": "off"}
BLOCKS = host_blocks(COMMAND, ARGS, ENV)


@asynccontextmanager
async def simulated() -> AsyncIterator[str]:
    """A simulated EvoLink on a free port: its address."""
    web = uvicorn.Server(uvicorn.Config(Simulator().app, port=0, log_level="error", lifespan="off"))
    async with anyio.create_task_group() as group:
        group.start_soon(web.serve)
        while not web.started:
            await anyio.lowlevel.checkpoint()
        try:
            yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
        finally:
            web.should_exit = True


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {
        "EVOLINK_BASE_URL": "http://127.0.0.1:9",
        "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
        "EVOLINK_MCP_ALLOWED_DIRS": str(folder),
        **more,
    }


async def examined(folder: Path, **more: str) -> Report:
    with anyio.fail_after(300):
        return await doctor.examine(environment(folder, **more))


def about(subject: str, findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


# --- the whole ---


@pytest.mark.anyio
async def test_a_well_installation_is_well(tmp_path: Path) -> None:
    async with simulated() as address:
        report = await examined(tmp_path, EVOLINK_BASE_URL=address, EVOLINK_API_KEY=KEY)
    assert {finding.subject: finding.verdict for finding in report.findings} == dict.fromkeys(
        ("python", "packages", "key", "network", "credits", "clock", "pictures", "folders", "journal"), "ok"
    )
    assert report.exit_code == 0
    assert "1000 credits" in about("credits", report.findings)[0].words


@pytest.mark.anyio
async def test_a_missing_key_is_a_warning_with_a_way_to_get_one(tmp_path: Path) -> None:
    report = await examined(tmp_path)
    (key,) = about("key", report.findings)
    assert (key.verdict, report.exit_code) == ("warning", 0)
    assert "https://evolink.ai/dashboard/keys" in key.todo
    assert about("credits", report.findings) == []


@pytest.mark.anyio
async def test_without_a_network_a_key_is_of_no_use(tmp_path: Path) -> None:
    report = await examined(tmp_path, EVOLINK_API_KEY=KEY)
    assert [about(name, report.findings)[0].verdict for name in ("network", "credits", "clock")] == [
        "broken", "broken", "unknown",
    ]  # fmt: skip
    assert report.exit_code == 1


@pytest.mark.anyio
async def test_nothing_of_the_key_is_shown_and_nothing_is_changed(tmp_path: Path) -> None:
    async with simulated() as address:
        report = await examined(tmp_path, EVOLINK_BASE_URL=address, EVOLINK_API_KEY=KEY)
    said = json.dumps(report.data())
    assert [part for part in (KEY, KEY[3:], KEY[-4:]) if part in said] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_a_setting_that_cannot_be_used_is_broken_and_named(tmp_path: Path) -> None:
    report = await examined(tmp_path, EVOLINK_MCP_WAIT_SECONDS="soon", EVOLINK_MCP_OUTPUTDIR="x")
    wrong, broken = about("settings", report.findings)
    assert (wrong.verdict, broken.verdict, report.exit_code) == ("warning", "broken", 1)
    assert "EVOLINK_MCP_OUTPUT_DIR" in wrong.todo
    assert "EVOLINK_MCP_WAIT_SECONDS" in broken.words


def test_the_command_line_tells_it_all_and_as_json(tmp_path: Path) -> None:
    env = minimal_environment(tmp_path, PYTHONUTF8="1", **environment(tmp_path))
    run = [*SERVER_COMMAND, "doctor"]
    told = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    data = subprocess.run([*run, "--json"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (told.returncode, told.stderr, data.returncode, data.stderr) == (0, "", 0, "")
    report = json.loads(data.stdout)
    assert (report["well"], len(report["hosts"])) == (True, len(BLOCKS))
    for finding in report["findings"]:
        assert finding["words"] in told.stdout
    for block in report["hosts"]:
        assert block["text"] in told.stdout
        assert f"{block['host']} ({block['where']})" in told.stdout


# --- each check ---


def test_an_old_python_is_broken() -> None:
    assert doctor.python_version((3, 10, 14)).verdict == "broken"
    assert doctor.python_version((3, 11, 0)).verdict == "ok"


def test_a_missing_package_is_broken_and_named() -> None:
    def version(name: str) -> str:
        if name == "pillow":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    found = doctor.packages(version)
    assert (found.verdict, "pillow" in found.words) == ("broken", True)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("key", "verdict"),
    [
        pytest.param(EXAMPLE_KEY, "broken", id="the example's"),
        pytest.param("no-such-beginning-1234", "warning", id="begins with something else"),
        pytest.param("${user_config.api_key}", "warning", id="an empty field of a bundle"),
    ],
)
async def test_a_key_is_looked_at_before_it_is_used(tmp_path: Path, key: str, verdict: str) -> None:
    report = await examined(tmp_path, EVOLINK_API_KEY=key)
    assert about("key", report.findings)[0].verdict == verdict


@pytest.mark.parametrize(
    ("date", "verdict", "said"),
    [
        pytest.param("Sun, 22 Nov 2026 12:00:00 GMT", "ok", "within 1 s", id="the same second"),
        pytest.param("Sun, 22 Nov 2026 12:01:00 GMT", "ok", "within 60 s", id="a minute"),
        pytest.param("Sun, 22 Nov 2026 12:01:01 GMT", "warning", "61 s behind", id="more than a minute behind"),
        pytest.param("Sun, 22 Nov 2026 11:00:00 GMT", "warning", "3600 s ahead", id="an hour ahead"),
        pytest.param("yesterday", "unknown", "not known", id="no date"),
        pytest.param("", "unknown", "not known", id="empty"),
        pytest.param(None, "unknown", "not known", id="absent"),
    ],
)
def test_the_clock_is_compared_with_the_api(date: str | None, verdict: str, said: str) -> None:
    found = doctor.clock(date, 1_795_348_800.0)
    assert (found.verdict, said in found.words) == (verdict, True)


def test_an_unreachable_api_matters_only_with_a_key() -> None:
    silent = Probe(problem="Connection refused")
    assert doctor.reached("https://x", silent, needed=True).verdict == "broken"
    assert doctor.reached("https://x", silent, needed=False).verdict == "warning"


def test_a_folder_that_cannot_be_made_is_broken_with_the_variable_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    found = doctor.writable("pictures", tmp_path / "file" / "below", "EVOLINK_MCP_OUTPUT_DIR")
    assert (found.verdict, "EVOLINK_MCP_OUTPUT_DIR" in found.todo) == ("broken", True)


@pytest.mark.anyio
async def test_an_allowed_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    report = await examined(tmp_path, EVOLINK_MCP_ALLOWED_DIRS=str(tmp_path / "gone"))
    assert "gone" in about("folders", report.findings)[0].words
    assert about("folders", report.findings)[0].verdict == "warning"


def test_the_journal_is_counted(tmp_path: Path) -> None:
    book = BlockingJournal(tmp_path)
    for phase in ("refused", "intent", "unknown"):
        book.intend(Entry(key=new_key(), owner=book.owner, phase=phase, created_at=1.0))
    book.close()
    (found,) = doctor.journal(tmp_path)
    assert found.verdict == "ok"
    assert "3 entries, 1 not finished, 1 with unknown outcome" in found.words
    assert "list_tasks" in found.todo


def test_a_damaged_journal_is_told_and_left_where_it_is(tmp_path: Path) -> None:
    """Opening it would set it aside: that is the server's to do."""
    (tmp_path / FILE_NAME).write_bytes(b"these are not the bytes of a database")
    (found,) = doctor.journal(tmp_path)
    assert (found.verdict, [path.name for path in tmp_path.iterdir()]) == ("broken", [FILE_NAME])


def test_reading_the_journal_changes_no_byte_of_it(tmp_path: Path) -> None:
    """Also while a server has it open, and what that one has written last is read."""
    book = BlockingJournal(tmp_path)
    book.intend(Entry(key=new_key(), owner=book.owner, phase="refused", created_at=1.0))

    def bytes_of_all() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = bytes_of_all()
    (found,) = doctor.journal(tmp_path)
    assert [entry.phase for entry in read_entries(tmp_path, 5)] == ["refused"]
    assert "1 entr" in found.words
    assert bytes_of_all() == before
    book.close()


def test_a_journal_that_was_set_aside_is_told(tmp_path: Path) -> None:
    aside = tmp_path / f"{FILE_NAME}.damaged-1790000000-abc123"
    aside.write_bytes(b"x")
    aside.with_name(f"{aside.name}-wal").write_bytes(b"x")
    ok, told = doctor.journal(tmp_path)
    assert (ok.verdict, told.verdict, str(aside) in told.words) == ("ok", "warning", True)


MOUNTS = """/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/me/local\\040disk xfs rw 0 0
bad line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/x", "ext4"),
        ("/home/me/.local/share", "nfs4"),
        ("/home/me/local disk/y", "xfs"),
        ("/homely", "ext4"),
        ("\\\\server\\share\\x", "cifs"),
    ],
)
def test_the_file_system_of_a_folder_is_the_nearest_mount(path: str, kind: str) -> None:
    assert doctor.file_system(Path(path), MOUNTS) == kind
    assert ("nfs4" in doctor.NETWORK_FILE_SYSTEMS, "ext4" in doctor.NETWORK_FILE_SYSTEMS) == (True, False)


# --- the blocks ---


def started_by(block: Block) -> tuple[str, list[str], dict[str, str]]:
    """What the host would start, as it reads the block."""
    if block.language == "toml":
        entry = tomllib.loads(block.text)["mcp_servers"]["evolink"]
    elif block.language == "json":
        servers = json.loads(block.text)
        (named,) = (servers[name] for name in ("mcpServers", "servers", "context_servers", "mcp") if name in servers)
        entry = named["evolink"]
        if "environment" in entry:  # opencode
            return entry["command"][0], entry["command"][1:], entry["environment"]
    else:
        words = shlex.split(block.text)
        pairs = [b for a, b in pairwise(words) if a in ("-e", "--env")]
        line = words[words.index("--") + 1 :] if "--" in words else words[words.index("evolink", 4) + 1 :]
        return line[0], line[1:], dict(pair.split("=", 1) for pair in pairs)
    return entry["command"], entry.get("args", []), entry["env"]


@pytest.mark.parametrize("block", [pytest.param(block, id=f"{block.host}, {block.where}") for block in BLOCKS])
def test_every_block_says_command_arguments_and_environment(block: Block) -> None:
    """Blanks in a path included; VS Code alone asks for the key instead."""
    env = {**ENV, "EVOLINK_API_KEY": f"${{input:{KEY_INPUT}}}"} if block.host == "VS Code" else ENV
    assert started_by(block) == (COMMAND, ARGS, env)


def test_twelve_hosts_are_served() -> None:
    served = list(dict.fromkeys(block.host for block in BLOCKS))
    assert served == [
        "Claude Desktop", "Claude Code", "Cursor", "VS Code", "Codex", "Gemini CLI", "Windsurf", "Zed", "opencode",
        "Copilot CLI", "Cline", "JetBrains",
    ]  # fmt: skip


def test_vs_code_asks_for_the_key_with_hidden_characters() -> None:
    (block,) = (block for block in BLOCKS if block.host == "VS Code")
    (asked,) = json.loads(block.text)["inputs"]
    assert (asked["type"], asked["id"], asked["password"]) == ("promptString", KEY_INPUT, True)


def test_codex_waits_for_as_long_as_its_host_row_says() -> None:
    from evolink_mcp.tools.hosts import host_named

    (block,) = (block for block in BLOCKS if block.language == "toml")
    entry = tomllib.loads(block.text)["mcp_servers"]["evolink"]
    assert (entry["tool_timeout_sec"], entry["startup_timeout_sec"] >= 30) == (host_named("codex").limit_s, True)


def test_a_block_survives_odd_paths() -> None:
    odd = 'C:\\Users\\Zoë "the" Quick\\evolink-mcp.exe'
    for block in host_blocks(odd, [], {"EVOLINK_API_KEY": "sk-..."}):
        if block.language != "sh" or sys.platform != "win32":
            assert started_by(block)[0] == odd


def test_the_installed_command_starts_this_version() -> None:
    command, args = installed_command()
    assert Path(command).is_absolute()
    done = subprocess.run([command, *args, "--version"], capture_output=True, text=True, check=True, timeout=300)
    assert re.fullmatch(r"evolink-mcp [\d.]+\n", done.stdout)


def test_without_an_installed_script_python_ignores_the_working_directory(tmp_path: Path) -> None:
    python = tmp_path / "python"
    assert installed_command(python) == (str(python), ["-P", "-m", "evolink_mcp"])


def test_an_installation_of_uvx_is_started_through_uvx(tmp_path: Path) -> None:
    command, arguments = installed_command(tmp_path / "archive-v0" / "abc" / "bin" / "python")
    assert (Path(command).stem, arguments) == ("uvx", ["evolink-mcp"])


@pytest.mark.parametrize(
    "environ",
    [
        {"EVOLINK_BASE_URL": "http://127.0.0.1:{port}"},
        {"SSL_CERT_FILE": "/nowhere"},
        {"ALL_PROXY": "socks5://127.0.0.1:1"},
        {"HTTPS_PROXY": "nonsense"},
    ],
    ids=["no HTTP", "no certificates", "SOCKS", "no proxy"],
)
def test_whatever_the_network_is_it_is_told_without_a_traceback(tmp_path: Path, environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            with suppress(OSError):
                while True:
                    line, _ = server.accept()
                    line.sendall(b"SSH-2.0-nothing\r\n")
                    line.close()

        threading.Thread(target=speak, daemon=True).start()
        port = str(server.getsockname()[1])
        here = f"https://127.0.0.1:{port}"  # nothing leaves this machine
        env = minimal_environment(tmp_path, EVOLINK_API_KEY="sk-0123456789abcdef", EVOLINK_BASE_URL=here)
        env |= {name: value.replace("{port}", port) for name, value in environ.items()}
        command = [*SERVER_COMMAND, "doctor", "--json"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        server.close()
    findings = {one["subject"]: one["verdict"] for one in json.loads(done.stdout)["findings"]}
    assert (done.returncode, done.stderr) == (1, "")
    assert findings["network"] == findings["credits"] == "broken"
