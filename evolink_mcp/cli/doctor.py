"""Check the installation. Each check changes nothing and returns findings. No finding contains the API key."""

from __future__ import annotations

import email.utils
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from evolink_mcp import __version__
from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.costs import format_credits
from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.app.settings import EXAMPLE_KEY, BadSetting
from evolink_mcp.causes import folder_fault
from evolink_mcp.cli.host_config import KEY_VARIABLE, Block, host_blocks, installed_command
from evolink_mcp.cli.team_checks import Finding, check_team
from evolink_mcp.errors import DecoderUnavailable, EvolinkError, JournalUnwritable, Problem
from evolink_mcp.images.decode_process import Decoder, expected_protections
from evolink_mcp.images.sandbox import Protection
from evolink_mcp.journal.entry import Entry, Stage
from evolink_mcp.journal.sqlite import FILE_NAME, read_entries, read_fact
from evolink_mcp.sanitize import harmless
from evolink_mcp.studio.callback_history import MISSED_FACT, MISSED_MAX, MISSING, missed_in
from evolink_mcp.teams.settings import TeamSettings

OLDEST_PYTHON = (3, 11)
PACKAGES = ("mcp", "httpx2", "pydantic", "anyio", "pillow", "platformdirs", "filelock", "starlette", "uvicorn")
SKEW_MAX_S = 60.0
FREE_MIN_BYTES = 200 << 20
ENTRIES_MAX = 100_000
JOURNAL_ADVICE = "The server refuses paid calls until it can write the journal."
SQLITE_MAGIC = b"SQLite format 3\0"
# The write-ahead log of SQLite needs shared memory, which these do not have between machines.
NETWORK_FILE_SYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb2",
        "smb3",
        "smbfs",
        "afs",
        "9p",
        "ceph",
        "glusterfs",
        "lustre",
        "davfs",
        "fuse.sshfs",
        "fuse.rclone",
        "fuse.s3fs",
    ]
)
MOUNTS = Path("/proc/self/mounts")


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, and the configuration of each MCP host for this installation."""

    findings: tuple[Finding, ...]
    blocks: tuple[Block, ...]

    @property
    def summary(self) -> str:
        """The last line of the report: the subjects that are broken."""
        broken = dict.fromkeys(finding.subject for finding in self.findings if finding.verdict == "broken")
        return f"Broken: {', '.join(broken)}. See above." if broken else "No check failed."

    @property
    def exit_code(self) -> int:
        """1 if a finding is "broken", else 0. A missing key and a missing network are "broken"."""
        return int(any(finding.verdict == "broken" for finding in self.findings))

    def data(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "version": __version__,
            "well": self.exit_code == 0,
            "findings": [asdict(finding) for finding in self.findings],
            "hosts": [asdict(block) for block in self.blocks],
        }


@dataclass(frozen=True, slots=True)
class Probe:
    """The answer of the API to a request without a key: its `Date` header, or the error that came instead."""

    date: str | None = None
    problem: Problem | None = None


async def examine(environment: Mapping[str, str] | None = None) -> Report:
    """Run all checks. The API key goes only to `GET /v1/credits` of EvoLink."""
    findings = [check_python(sys.version_info[:3]), check_packages()]
    findings += check_variables(TeamSettings.unknown_variables(environment))
    try:
        settings = TeamSettings.from_environment(environment).with_stored_key()
    except BadSetting as error:
        findings.append(Finding("settings", "broken", str(error), "Correct or remove this variable."))
    else:
        findings.append(check_key(settings))
        findings += [Finding("network", "warning", warning) for warning in settings.foreign_hosts]
        findings += await check_account(settings)
        with closing(Decoder(decoder_environment())) as decoder:
            findings.append(await check_decoder(decoder, expected_protections()))
        findings += check_folders(settings)
        if settings.database_url is None:
            findings += check_journal(settings.data_dir)
        else:
            findings.append(check_database(settings.database_url))
        findings += check_callbacks(settings)
        findings += await check_team(settings)
    command, arguments = installed_command()
    return Report(tuple(findings), host_blocks(command, arguments, {KEY_VARIABLE: EXAMPLE_KEY}))


# --- this machine ---


def check_python(version: Sequence[int]) -> Finding:
    """Check the version of Python."""
    build = f"{platform.python_implementation()}, {platform.system()}"
    text = f"Python {'.'.join(map(str, version))} ({build}), {sys.executable}"
    if tuple(version) < OLDEST_PYTHON:
        return Finding("python", "broken", text, "Install Python 3.11 or newer.")
    return Finding("python", "ok", text)


def check_packages(version_of: Callable[[str], str] = metadata.version) -> Finding:
    """Check that all required packages are installed, and list their versions."""
    versions: list[str] = [f"evolink-mcp {__version__}"]
    missing: list[str] = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version_of(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", "broken", f"not installed: {', '.join(missing)}", "Install evolink-mcp again.")
    return Finding("packages", "ok", ", ".join(versions))


def check_variables(unknown: Mapping[str, str | None]) -> list[Finding]:
    """Report each unknown variable with the setting that the user probably meant."""
    return [
        Finding(
            "settings",
            "warning",
            f"{name} is not a setting and has no effect",
            f"Did you mean {similar}?" if similar else "Remove it. See evolink-mcp --help for all settings.",
        )
        for name, similar in unknown.items()
    ]


async def check_decoder(decoder: Decoder, expected: Protection) -> Finding:
    """Start the image decoder and compare its active protections with those that this platform should have."""
    try:
        active = await decoder.protections()
    except DecoderUnavailable as error:
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        return Finding(
            "decoder",
            "broken",
            f"the image decoder process does not start{reason}",
            "Install evolink-mcp again. Until it starts, the server saves no images and accepts no reference images.",
        )
    text = f"the image decoder runs with {_names(active) or 'no protections'}"
    if missing := expected & ~active:
        return Finding(
            "decoder",
            "warning",
            f"{text}, without {_names(missing)}",
            "An image file could exploit the decoder more easily. Update the system, or allow these in the container.",
        )
    return Finding("decoder", "ok", text)


def _names(protections: Protection) -> str:
    return ", ".join((flag.name or "").lower().replace("_", " ") for flag in Protection if flag in protections)


# --- EvoLink ---


def check_key(settings: TeamSettings) -> Finding:
    """Check that an API key is set and looks valid."""
    if settings.key_problem:
        return Finding("key", "broken", settings.key_problem, f"Set {KEY_VARIABLE} to your EvoLink key.")
    if settings.key is None:
        return Finding(
            "key",
            "broken",
            f"{KEY_VARIABLE} is not set: only the free offline tools work",
            "Create a key at https://evolink.ai/dashboard/keys and put it into the configuration of your MCP host.",
        )
    if not settings.key.get_secret_value().startswith("sk-"):
        return Finding(
            "key", "warning", "a key is set, but EvoLink's keys begin with sk-", "Check that the key is complete."
        )
    return Finding("key", "ok", "a key is set (doctor does not show it)")


async def check_account(settings: TeamSettings, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Check the network, the API key, the credits and the clock (epoch seconds) with two requests to EvoLink."""
    async with EvolinkClient(
        settings.key, base_url=settings.base_url, files_base_url=settings.files_base_url, clock=clock
    ) as client:
        try:
            probe = Probe(date=await client.date())
        except EvolinkError as error:
            probe = Probe(problem=error.problem)
        findings = [check_network(settings.base_url, probe)]
        if settings.key is not None:
            findings.append(await _check_credits(client))
    return [*findings, check_clock(probe.date, clock())]


def check_network(base_url: str, probe: Probe) -> Finding:
    """Report whether the API answered. The texts are those of the tools."""
    if probe.problem is None:
        return Finding("network", "ok", f"{base_url} answers")
    return Finding(
        "network",
        "broken",
        probe.problem.message,
        f"{probe.problem.advice} MCP hosts pass few variables to a server: set variables in its configuration there.",
    )


async def _check_credits(client: EvolinkClient) -> Finding:
    try:
        balance = await client.balance()
    except EvolinkError as error:
        return Finding("credits", "broken", error.message, error.advice)
    amounts = [amount for amount in (balance.account_remaining, balance.key_remaining) if amount is not None]
    if balance.key_unlimited and balance.account_remaining is not None:
        amounts = [balance.account_remaining]
    if not amounts:
        return Finding("credits", "ok", "EvoLink accepts the key and reports no balance")
    # The smaller balance limits a purchase.
    if min(amounts) <= 0:
        return Finding("credits", "warning", "EvoLink accepts the key, but it has no credits", "Top up the account.")
    return Finding("credits", "ok", f"EvoLink accepts the key; it has {format_credits(min(amounts))}")


def check_clock(date: str | None, now: float) -> Finding:
    """Compare the clock (`now`, epoch seconds) with the API's `Date` header. A minute of difference is accepted."""
    try:
        api_time = email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return Finding("clock", "unknown", "the time at EvoLink is not known, so the clock was not compared")
    skew = now - api_time
    if abs(skew) > SKEW_MAX_S:
        direction = "ahead of" if skew > 0 else "behind"
        return Finding(
            "clock",
            "warning",
            f"this clock is {abs(skew):.0f} s {direction} EvoLink's",
            "Set the clock. The server searches lost answers by time, and image links expire after 24 h.",
        )
    return Finding("clock", "ok", f"within {max(abs(skew), 1):.0f} s of EvoLink's")


# --- folders and journal ---


def check_folders(settings: TeamSettings) -> list[Finding]:
    """Check that images can be saved, and that all allowed folders exist."""
    folders = settings.folders
    findings = [check_writable("pictures", folders.output, "EVOLINK_MCP_OUTPUT_DIR")]
    for folder in folders.allowed:
        if folder != folders.output and not folder.is_dir():
            text = f"the allowed folder {folder} does not exist"
            findings.append(Finding("folders", "warning", text, "Create it, or correct EVOLINK_MCP_ALLOWED_DIRS."))
    allowed = ", ".join(map(str, folders.allowed))
    return [*findings, Finding("folders", "ok", f"local images are read from {allowed}")]


def check_writable(subject: str, folder: Path, variable: str) -> Finding:
    """Write a temporary file in `folder`, or in its nearest existing parent."""
    # doctor changes nothing, so it does not create the folder.
    parent = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=parent):
            free_bytes = shutil.disk_usage(parent).free
    except OSError as error:
        cause = folder_fault(folder, error, variable)
        return Finding(subject, "broken", cause.meaning, cause.next_step)
    if free_bytes < FREE_MIN_BYTES:
        text = f"{folder} has only {free_bytes >> 20} MiB of free space"
        return Finding(subject, "warning", text, f"Free some space, or set {variable} to another folder.")
    return Finding(subject, "ok", str(folder) if parent == folder else f"{folder} (the first image creates it)")


def check_journal(data_dir: Path) -> list[Finding]:
    """Check that the journal is readable and local, and report damaged journals that the server renamed."""
    findings = [check_writable("journal", data_dir, "EVOLINK_MCP_DATA_DIR")]
    path = data_dir / FILE_NAME
    if findings[0].verdict == "ok" and path.exists():
        findings = [_check_journal_file(path)]
    findings += [
        Finding(
            "journal",
            "warning",
            f"the server renamed a damaged journal to {damaged}",
            "Keep the file until you know that no task is missing. list_tasks with sync=true asks EvoLink for all tasks.",
        )
        # The pattern omits the files -wal and -shm of the same journal.
        for damaged in sorted(data_dir.glob(f"{path.name}.damaged-*[0-9a-f]"))
    ]
    kind = file_system(data_dir)
    if kind in NETWORK_FILE_SYSTEMS:
        findings.append(
            Finding(
                "journal",
                "warning",
                f"{data_dir} is on a network file system ({kind}): SQLite is not safe there",
                "Set EVOLINK_MCP_DATA_DIR to a folder of this machine.",
            )
        )
    return findings


def _check_journal_file(path: Path) -> Finding:
    try:
        with path.open("rb") as file:
            magic = file.read(len(SQLITE_MAGIC))
        # SQLite accepts an empty file as a new journal.
        if magic not in (b"", SQLITE_MAGIC):
            advice = "Start the server: it renames the file, deletes nothing and creates a new journal."
            return Finding("journal", "broken", f"{path} is damaged", advice)
        entries = read_entries(path.parent, ENTRIES_MAX)
    except (OSError, JournalUnwritable) as error:
        text = error.message if isinstance(error, JournalUnwritable) else f"{path}: {error.strerror}"
        return Finding("journal", "broken", text, JOURNAL_ADVICE)
    return _count(str(path), entries)


def check_database(url: str) -> Finding:
    """Check that the database of the team is readable."""
    from evolink_mcp.teams import schema

    try:
        place, entries = schema.read_entries(url, ENTRIES_MAX)
    except JournalUnwritable as error:
        return Finding("journal", "broken", error.message, JOURNAL_ADVICE)
    return _count(place, entries)


def check_callbacks(settings: TeamSettings) -> list[Finding]:
    """Check that EvoLink's callbacks arrived for the last tasks of each account, if the server has a public URL."""
    if settings.public_url is None:
        return []
    try:
        if settings.database_url is not None:
            from evolink_mcp.teams import schema

            counts = schema.read_fact(settings.database_url, MISSED_FACT)
        else:
            counts = read_fact(settings.data_dir, MISSED_FACT) if (settings.data_dir / FILE_NAME).exists() else []
    except JournalUnwritable:
        return []  # the check of the journal reports it
    if any(missed_in(count) >= MISSED_MAX for count in counts):
        return [Finding("callbacks", "warning", MISSING, "Polls find each image some seconds later.")]
    return [Finding("callbacks", "ok", f"no callback to {harmless(settings.public_url, 200)} is missing")]


def _count(place: str, entries: list[Entry]) -> Finding:
    unsettled = sum(entry.stage is Stage.OPEN for entry in entries)
    unclear = sum(entry.charged == "unknown" for entry in entries)
    text = f"{place}: {len(entries)} entries, {unsettled} not finished, {unclear} with unknown outcome"
    advice = "Call list_tasks with sync=true: it searches the unknown outcomes at EvoLink." if unclear else ""
    return Finding("journal", "ok", text, advice)


def file_system(path: Path, mounts: str | None = None) -> str | None:
    """Return the type of the file system of `path`; None if the platform does not report it (macOS, Windows drives)."""
    if str(path).startswith("\\\\"):
        return "cifs"
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(errors="replace")
        except OSError:
            return None
    resolved = path.resolve()
    longest = -1
    kind = None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) > 2:
            # The kernel writes a blank in a path as \040.
            mount_point = Path(fields[1].replace("\\040", " "))
            # A later mount at the same place hides an earlier one.
            if resolved.is_relative_to(mount_point) and len(mount_point.parts) >= longest:
                longest = len(mount_point.parts)
                kind = fields[2]
    return kind
