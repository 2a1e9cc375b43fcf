"""`doctor` finds problems, changes nothing and never shows the key. MCP hosts can read its configurations."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing, suppress
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import anyio
import pytest
import uvicorn
from blocking import BlockingJournal
from child_processes import SERVER_COMMAND, minimal_environment

from evolink_mcp import __version__
from evolink_mcp.app.settings import EXAMPLE_KEY
from evolink_mcp.cli import doctor
from evolink_mcp.cli.doctor import Finding, Report
from evolink_mcp.cli.host_config import KEY_INPUT, Block, host_blocks, installed_command
from evolink_mcp.images.decode_process import Decoder, expected_protections
from evolink_mcp.images.sandbox import Protection
from evolink_mcp.journal.entry import Entry, new_key
from evolink_mcp.journal.sqlite import FILE_NAME, SqliteJournal, read_entries
from evolink_mcp.simulator.app import Simulator
from evolink_mcp.studio.callback_history import MISSED_FACT

KEY = "sk-canary-0123456789abcdef"
COMMAND = "/opt/my tools/evolink-mcp"
ARGUMENTS = ["--verbose"]
ENV = {"EVOLINK_API_KEY": "sk-...", "EVOLINK_MCP_PREVIEW": "off"}
BLOCKS = host_blocks(COMMAND, ARGUMENTS, ENV)


@asynccontextmanager
async def simulated_evolink() -> AsyncIterator[str]:
    """Serve a simulated EvoLink on a free port. Yield its base URL."""
    web = uvicorn.Server(uvicorn.Config(Simulator().app, port=0, log_level="error", lifespan="off"))
    async with anyio.create_task_group() as group:
        group.start_soon(web.serve)
        while not web.started:
            await anyio.lowlevel.checkpoint()
        try:
            yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
        finally:
            web.should_exit = True


def environment(folder: Path, **settings: str) -> dict[str, str]:
    return {
        "EVOLINK_BASE_URL": "http://127.0.0.1:9",
        "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
        "EVOLINK_MCP_ALLOWED_DIRS": str(folder),
        **settings,
    }


async def examine(folder: Path, **settings: str) -> Report:
    with anyio.fail_after(300):
        return await doctor.examine(environment(folder, **settings))


def findings_about(subject: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


# --- all checks ---


@pytest.mark.anyio
async def test_an_intact_installation_has_no_problem(tmp_path: Path) -> None:
    async with simulated_evolink() as base_url:
        report = await examine(tmp_path, EVOLINK_BASE_URL=base_url, EVOLINK_API_KEY=KEY)
    assert {finding.subject: finding.verdict for finding in report.findings} == dict.fromkeys(
        ("python", "packages", "key", "network", "credits", "clock", "decoder", "pictures", "folders", "journal"), "ok"
    )
    assert report.exit_code == 0
    assert "1000 credits" in findings_about("credits", report.findings)[0].words


@pytest.mark.anyio
async def test_a_missing_key_is_broken_and_the_report_states_where_to_create_one(tmp_path: Path) -> None:
    report = await examine(tmp_path)
    (finding,) = findings_about("key", report.findings)
    assert (finding.verdict, report.exit_code) == ("broken", 1)
    assert "https://evolink.ai/dashboard/keys" in finding.todo
    assert findings_about("credits", report.findings) == []


@pytest.mark.anyio
@pytest.mark.parametrize("missed", [0, 2, 3])
@pytest.mark.parametrize("database", [False, True], ids=["file", "database"])
async def test_missing_callbacks_of_an_account_are_a_warning(
    tmp_path: Path, request: pytest.FixtureRequest, missed: int, database: bool
) -> None:
    settings = {"EVOLINK_MCP_PUBLIC_URL": "https://images.example.org", "EVOLINK_MCP_SECRET": "s" * 32}
    if database:
        settings["EVOLINK_MCP_DATABASE_URL"] = request.getfixturevalue("cluster").database()
        from evolink_mcp.teams.database import open_database
        from evolink_mcp.teams.postgres import PostgresJournal

        async with open_database(settings["EVOLINK_MCP_DATABASE_URL"]) as team_database:
            await PostgresJournal(team_database, "a1").save_fact(MISSED_FACT, str(missed))
    else:
        journal = SqliteJournal(tmp_path / "data", "a1")
        await journal.save_fact(MISSED_FACT, str(missed))
        await journal.close()
    report = await examine(tmp_path, EVOLINK_API_KEY=KEY, **settings)
    (finding,) = findings_about("callbacks", report.findings)
    assert finding.verdict == ("warning" if missed == 3 else "ok")
    assert ("EVOLINK_MCP_PUBLIC_URL" in finding.words) == (missed == 3)


@pytest.mark.anyio
async def test_with_a_key_a_missing_network_is_broken(tmp_path: Path) -> None:
    report = await examine(tmp_path, EVOLINK_API_KEY=KEY)
    verdicts = {finding.subject: finding.verdict for finding in report.findings}
    assert (verdicts["network"], verdicts["credits"], verdicts["clock"]) == ("broken", "broken", "unknown")
    assert report.exit_code == 1


@pytest.mark.anyio
async def test_the_report_does_not_contain_the_key_and_no_file_changes(tmp_path: Path) -> None:
    async with simulated_evolink() as base_url:
        report = await examine(tmp_path, EVOLINK_BASE_URL=base_url, EVOLINK_API_KEY=KEY)
    text = json.dumps(report.data())
    assert [part for part in (KEY, KEY[3:], KEY[-4:]) if part in text] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_an_invalid_setting_is_broken_and_named(tmp_path: Path) -> None:
    report = await examine(tmp_path, EVOLINK_MCP_WAIT_SECONDS="soon", EVOLINK_MCP_OUTPUTDIR="x")
    unknown, invalid = findings_about("settings", report.findings)
    assert (unknown.verdict, invalid.verdict, report.exit_code) == ("warning", "broken", 1)
    assert "EVOLINK_MCP_OUTPUT_DIR" in unknown.todo
    assert "EVOLINK_MCP_WAIT_SECONDS" in invalid.words


def test_text_and_json_contain_the_same_findings_and_configurations(tmp_path: Path) -> None:
    env = minimal_environment(tmp_path, PYTHONUTF8="1", **environment(tmp_path))
    command = [*SERVER_COMMAND, "doctor"]
    text_run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    json_run = subprocess.run([*command, "--json"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (text_run.returncode, text_run.stderr, json_run.returncode, json_run.stderr) == (1, "", 1, "")
    assert text_run.stdout.endswith("Broken: key, network. See above.\n")
    report = json.loads(json_run.stdout)
    assert (report["well"], len(report["hosts"])) == (False, len(BLOCKS))
    for finding in report["findings"]:
        assert finding["words"] in text_run.stdout
    for block in report["hosts"]:
        assert block["text"] in text_run.stdout
        assert f"{block['host']} ({block['where']})" in text_run.stdout


# --- each check ---


def test_an_old_python_is_broken() -> None:
    assert doctor.check_python((3, 10, 14)).verdict == "broken"
    assert doctor.check_python((3, 11, 0)).verdict == "ok"


def test_a_missing_package_is_broken_and_named() -> None:
    def version(name: str) -> str:
        if name == "pillow":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    finding = doctor.check_packages(version)
    assert (finding.verdict, "pillow" in finding.words) == ("broken", True)


@pytest.mark.anyio
async def test_the_active_protections_of_the_image_decoder_are_listed(decoder: Decoder) -> None:
    finding = await doctor.check_decoder(decoder, expected_protections())
    assert finding.verdict == "ok"
    assert finding.words.startswith("the image decoder runs with ")
    if sys.platform == "linux":
        assert finding.words.endswith("resource limits, no new privileges, syscall filter")


@pytest.mark.anyio
async def test_a_missing_protection_of_the_image_decoder_is_a_warning(decoder: Decoder) -> None:
    active = await decoder.protections()
    missing = next(flag for flag in Protection if flag not in active)
    finding = await doctor.check_decoder(decoder, active | missing)
    assert finding.verdict == "warning"
    assert finding.words.endswith(f", without {missing.name.lower().replace('_', ' ')}")


@pytest.mark.anyio
async def test_an_image_decoder_that_does_not_start_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Decoder({}, command=[str(tmp_path / "missing-program")])) as decoder:
        finding = await doctor.check_decoder(decoder, expected_protections())
    assert finding.verdict == "broken"
    # On Windows the system's error does not name the program.
    assert ("WinError 2" if sys.platform == "win32" else "missing-program") in finding.words
    assert len(caplog.records) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("key", "verdict"),
    [
        pytest.param(EXAMPLE_KEY, "broken", id="example"),
        pytest.param("no-such-beginning-1234", "warning", id="other prefix"),
        pytest.param("${user_config.api_key}", "broken", id="empty field of a bundle"),
    ],
)
async def test_an_unusual_key_is_reported(tmp_path: Path, key: str, verdict: str) -> None:
    report = await examine(tmp_path, EVOLINK_API_KEY=key)
    assert findings_about("key", report.findings)[0].verdict == verdict


@pytest.mark.parametrize(
    ("date", "verdict", "text"),
    [
        pytest.param("Sun, 22 Nov 2026 12:00:00 GMT", "ok", "within 1 s", id="same second"),
        pytest.param("Sun, 22 Nov 2026 12:01:00 GMT", "ok", "within 60 s", id="a minute"),
        pytest.param("Sun, 22 Nov 2026 12:01:01 GMT", "warning", "61 s behind", id="more than a minute behind"),
        pytest.param("Sun, 22 Nov 2026 11:00:00 GMT", "warning", "3600 s ahead", id="an hour ahead"),
        pytest.param("yesterday", "unknown", "not known", id="no date"),
        pytest.param("", "unknown", "not known", id="empty"),
        pytest.param(None, "unknown", "not known", id="absent"),
    ],
)
def test_the_clock_is_compared_with_the_api(date: str | None, verdict: str, text: str) -> None:
    finding = doctor.check_clock(date, 1_795_348_800.0)
    assert (finding.verdict, text in finding.words) == (verdict, True)


@pytest.mark.anyio
async def test_a_missing_network_is_broken_with_and_without_a_key(tmp_path: Path) -> None:
    for settings in ({}, {"EVOLINK_API_KEY": KEY}):
        report = await examine(tmp_path, **settings)
        (finding,) = findings_about("network", report.findings)
        assert (finding.verdict, report.exit_code) == ("broken", 1)
        assert "127.0.0.1:9 refuses the connection" in finding.words
        assert "network" in report.summary


def test_an_unwritable_folder_is_broken_and_its_variable_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    finding = doctor.check_writable("pictures", tmp_path / "file" / "below", "EVOLINK_MCP_OUTPUT_DIR")
    assert (finding.verdict, "EVOLINK_MCP_OUTPUT_DIR" in finding.todo) == ("broken", True)


@pytest.mark.anyio
async def test_a_missing_allowed_folder_is_a_warning(tmp_path: Path) -> None:
    report = await examine(tmp_path, EVOLINK_MCP_ALLOWED_DIRS=str(tmp_path / "missing"))
    finding = findings_about("folders", report.findings)[0]
    assert (finding.verdict, "missing" in finding.words) == ("warning", True)


def test_the_entries_of_the_journal_are_counted(tmp_path: Path) -> None:
    journal = BlockingJournal(tmp_path)
    for phase in ("refused", "intent", "unknown"):
        journal.intend(Entry(key=new_key(), owner=journal.owner, phase=phase, created_at=1.0))
    journal.close()
    (finding,) = doctor.check_journal(tmp_path)
    assert finding.verdict == "ok"
    assert "3 entries, 1 not finished, 1 with unknown outcome" in finding.words
    assert "list_tasks" in finding.todo


def test_a_damaged_journal_is_broken_and_keeps_its_name(tmp_path: Path) -> None:
    """Only a server renames a damaged journal."""
    (tmp_path / FILE_NAME).write_bytes(b"not the content of a database")
    (finding,) = doctor.check_journal(tmp_path)
    assert (finding.verdict, [path.name for path in tmp_path.iterdir()]) == ("broken", [FILE_NAME])


def test_reading_an_open_journal_changes_no_byte_and_includes_the_last_entry(tmp_path: Path) -> None:
    journal = BlockingJournal(tmp_path)
    journal.intend(Entry(key=new_key(), owner=journal.owner, phase="refused", created_at=1.0))

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    (finding,) = doctor.check_journal(tmp_path)
    assert [entry.phase for entry in read_entries(tmp_path, 5)] == ["refused"]
    assert "1 entr" in finding.words
    assert contents() == before
    journal.close()


def test_a_renamed_damaged_journal_is_reported(tmp_path: Path) -> None:
    damaged_file = tmp_path / f"{FILE_NAME}.damaged-1790000000-abc123"
    damaged_file.write_bytes(b"x")
    damaged_file.with_name(f"{damaged_file.name}-wal").write_bytes(b"x")
    intact_finding, renamed_finding = doctor.check_journal(tmp_path)
    assert (intact_finding.verdict, renamed_finding.verdict) == ("ok", "warning")
    assert str(damaged_file) in renamed_finding.words


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
def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount_point(path: str, kind: str) -> None:
    assert doctor.file_system(Path(path), MOUNTS) == kind
    assert ("nfs4" in doctor.NETWORK_FILE_SYSTEMS, "ext4" in doctor.NETWORK_FILE_SYSTEMS) == (True, False)


# --- the configurations of MCP hosts ---


def command_in(block: Block) -> tuple[str, list[str], dict[str, str]]:
    """Return the command, arguments and environment that the MCP host would use."""
    if block.language == "toml":
        entry = tomllib.loads(block.text)["mcp_servers"]["evolink"]
    elif block.language == "json":
        servers = json.loads(block.text)
        (group,) = (servers[name] for name in ("mcpServers", "servers", "context_servers", "mcp") if name in servers)
        entry = group["evolink"]
        if "environment" in entry:  # opencode
            return entry["command"][0], entry["command"][1:], entry["environment"]
    else:
        words = shlex.split(block.text)
        pairs = [b for a, b in pairwise(words) if a in ("-e", "--env")]
        line = words[words.index("--") + 1 :] if "--" in words else words[words.index("evolink", 4) + 1 :]
        return line[0], line[1:], dict(pair.split("=", 1) for pair in pairs)
    return entry["command"], entry.get("args", []), entry["env"]


@pytest.mark.parametrize("block", [pytest.param(block, id=f"{block.host}, {block.where}") for block in BLOCKS])
def test_every_configuration_contains_command_arguments_and_environment(block: Block) -> None:
    """The path contains a blank. VS Code asks the user for the key."""
    env = {**ENV, "EVOLINK_API_KEY": f"${{input:{KEY_INPUT}}}"} if block.host == "VS Code" else ENV
    assert command_in(block) == (COMMAND, ARGUMENTS, env)


def test_twelve_mcp_hosts_have_a_configuration() -> None:
    hosts = list(dict.fromkeys(block.host for block in BLOCKS))
    assert hosts == [
        "Claude Desktop", "Claude Code", "Cursor", "VS Code", "Codex", "Gemini CLI", "Windsurf", "Zed", "opencode",
        "Copilot CLI", "Cline", "JetBrains",
    ]  # fmt: skip


def test_vs_code_hides_the_characters_of_the_key() -> None:
    (block,) = (block for block in BLOCKS if block.host == "VS Code")
    (field,) = json.loads(block.text)["inputs"]
    assert (field["type"], field["id"], field["password"]) == ("promptString", KEY_INPUT, True)


def test_the_timeout_of_codex_equals_the_limit_in_the_table_of_hosts() -> None:
    from evolink_mcp.tools.hosts import host_named

    (block,) = (block for block in BLOCKS if block.language == "toml")
    entry = tomllib.loads(block.text)["mcp_servers"]["evolink"]
    assert (entry["tool_timeout_sec"], entry["startup_timeout_sec"] >= 30) == (host_named("codex").limit_s, True)


def test_a_path_with_quotes_and_blanks_is_escaped() -> None:
    path = 'C:\\Users\\Zoë "the" Quick\\evolink-mcp.exe'
    for block in host_blocks(path, [], {"EVOLINK_API_KEY": "sk-..."}):
        if block.language != "sh" or sys.platform != "win32":
            assert command_in(block)[0] == path


def test_the_installed_command_starts_this_version() -> None:
    command, arguments = installed_command()
    assert Path(command).is_absolute()
    result = subprocess.run([command, *arguments, "--version"], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout == f"evolink-mcp {__version__}\n"


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
def test_every_network_problem_is_reported_without_a_traceback(tmp_path: Path, environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_without_http() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"SSH-2.0-nothing\r\n")
                    connection.close()

        threading.Thread(target=answer_without_http, daemon=True).start()
        port = str(server.getsockname()[1])
        base_url = f"https://127.0.0.1:{port}"
        env = minimal_environment(tmp_path, EVOLINK_API_KEY="sk-0123456789abcdef", EVOLINK_BASE_URL=base_url)
        env |= {name: value.replace("{port}", port) for name, value in environ.items()}
        command = [*SERVER_COMMAND, "doctor", "--json"]
        result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        server.close()
    verdicts = {finding["subject"]: finding["verdict"] for finding in json.loads(result.stdout)["findings"]}
    assert (result.returncode, result.stderr) == (1, "")
    assert verdicts["network"] == verdicts["credits"] == "broken"
