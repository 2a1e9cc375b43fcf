"""Does this installation work? Each check looks at one thing, changes nothing, and returns what it found as data.

Nothing of the key is ever in a finding.
"""

from __future__ import annotations

import email.utils
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from evolink_mcp import __version__
from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.costs import priced
from evolink_mcp.app.settings import Settings, unknown_variables
from evolink_mcp.app.values import EXAMPLE_KEY, BadSetting
from evolink_mcp.cli.host_config import KEY_VARIABLE, Block, host_blocks, installed_command
from evolink_mcp.cli.team_checks import Finding, team
from evolink_mcp.errors import EvolinkError, JournalUnwritable
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.file import FILE_NAME
from evolink_mcp.journal.sqlite import read_entries

OLDEST_PYTHON = (3, 11)
PACKAGES = ("mcp", "httpx2", "pydantic", "anyio", "pillow", "platformdirs", "filelock", "starlette", "uvicorn")
SKEW_MAX_S = 60.0
ROOM_MIN_BYTES = 200 << 20
ENTRIES_MAX = 100_000
REFUSED = "Paid calls are refused until it can be written."
SQLITE_MAGIC = b"SQLite format 3\0"
NETWORK_FILE_SYSTEMS = frozenset({
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "9p", "ceph", "glusterfs", "lustre", "davfs",
    "fuse.sshfs", "fuse.rclone", "fuse.s3fs",
})  # fmt: skip
MOUNTS = Path("/proc/self/mounts")


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, and the block of every host for this very installation."""

    findings: tuple[Finding, ...]
    blocks: tuple[Block, ...]

    @property
    def exit_code(self) -> int:
        """1 when something is broken; warnings and what could not be found out are 0."""
        return int(any(finding.verdict == "broken" for finding in self.findings))

    def data(self) -> dict[str, Any]:
        """The report as JSON can carry it."""
        return {
            "version": __version__,
            "well": self.exit_code == 0,
            "findings": [asdict(finding) for finding in self.findings],
            "hosts": [asdict(block) for block in self.blocks],
        }


@dataclass(frozen=True, slots=True)
class Probe:
    """What the API's host answered to a request without a key: the date it gave, or why there was no answer."""

    date: str | None = None
    problem: str | None = None


async def examine(environment: Mapping[str, str] | None = None) -> Report:
    """Look at everything. Sends the key, if there is one, to EvoLink's `GET /v1/credits` and nowhere else."""
    findings = [python_version(sys.version_info[:3]), packages()]
    findings += variables(unknown_variables(environment))
    try:
        settings = Settings.from_environment(environment)
    except BadSetting as error:
        findings.append(Finding("settings", "broken", str(error), "Correct or remove this variable."))
    else:
        findings.append(key(settings))
        findings += [Finding("network", "warning", told) for told in settings.strange_hosts]
        findings += await account(settings)
        findings += folders(settings)
        findings += (
            journal(settings.data_dir) if settings.database_url is None else [team_journal(settings.database_url)]
        )
        findings += await team(settings)
    command, args = installed_command()
    return Report(tuple(findings), host_blocks(command, args, {KEY_VARIABLE: EXAMPLE_KEY}))


# --- this machine ---


def python_version(version: Sequence[int]) -> Finding:
    """Python is new enough."""
    kind = f"{platform.python_implementation()}, {platform.system()}"
    told = f"Python {'.'.join(map(str, version))} ({kind}), {sys.executable}"
    if tuple(version) < OLDEST_PYTHON:
        return Finding("python", "broken", told, "Install Python 3.11 or newer.")
    return Finding("python", "ok", told)


def packages(version_of: Callable[[str], str] = metadata.version) -> Finding:
    """Everything that is needed is installed, and in which version."""
    found: list[str] = [f"evolink-mcp {__version__}"]
    missing: list[str] = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version_of(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", "broken", f"not installed: {', '.join(missing)}", "Install evolink-mcp again.")
    return Finding("packages", "ok", ", ".join(found))


def variables(unknown: Mapping[str, str | None]) -> list[Finding]:
    """Every EVOLINK_ variable is one that somebody reads."""
    return [
        Finding(
            "settings", "warning", f"{name} is set and means nothing",
            f"Did you mean {meant}?" if meant else "Remove it; README.md lists every setting.",
        )
        for name, meant in unknown.items()
    ]  # fmt: skip


# --- EvoLink ---


def key(settings: Settings) -> Finding:
    """A key is set and looks like one."""
    if settings.key_problem:
        return Finding("key", "broken", settings.key_problem, f"Set {KEY_VARIABLE} to your EvoLink key.")
    if settings.key is None:
        return Finding(
            "key", "warning", f"{KEY_VARIABLE} is not set: only the free, offline tools work",
            "Make a key at https://evolink.ai/dashboard/keys and put it into your host's block below.",
        )  # fmt: skip
    if not settings.key.get_secret_value().startswith("sk-"):
        return Finding("key", "warning", "a key is set, but EvoLink's keys begin with sk-", "Check that it is whole.")
    return Finding("key", "ok", "a key is set (it is not shown)")


async def account(settings: Settings) -> list[Finding]:
    """EvoLink can be reached, takes the key, has credits left for it, and agrees about the time."""
    async with EvolinkClient(
        settings.key, base_url=settings.base_url, files_base_url=settings.files_base_url
    ) as client:
        try:
            seen = Probe(date=await client.date())
        except EvolinkError as error:
            seen = Probe(problem=error.message)
        findings = [reached(settings.base_url, seen, needed=settings.key is not None)]
        if settings.key is not None:
            findings.append(await _credits(client))
    return [*findings, clock(seen.date, time.time())]


def reached(base_url: str, seen: Probe, *, needed: bool) -> Finding:
    """The API's host answers; without a key nothing is asked of it anyway."""
    if seen.problem is None:
        return Finding("network", "ok", f"{base_url} answers")
    return Finding(
        "network", "broken" if needed else "warning", f"{base_url} does not answer: {seen.problem}",
        "Check the network, the proxy and EVOLINK_BASE_URL. Hosts pass few variables on: set HTTPS_PROXY in their env.",
    )  # fmt: skip


async def _credits(client: EvolinkClient) -> Finding:
    try:
        balance = await client.balance()
    except EvolinkError as error:
        return Finding("credits", "broken", error.message, error.advice)
    left = [amount for amount in (balance.account_remaining, balance.key_remaining) if amount is not None]
    if balance.key_unlimited and balance.account_remaining is not None:
        left = [balance.account_remaining]
    if not left:
        return Finding("credits", "ok", "EvoLink takes the key and names no balance")
    if min(left) <= 0:
        return Finding("credits", "warning", "EvoLink takes the key, but no credits are left for it", "Top up first.")
    return Finding("credits", "ok", f"EvoLink takes the key; {priced(min(left))} are left for it")


def clock(date: str | None, now: float) -> Finding:
    """This machine's clock agrees with the API's `Date` header, to a minute."""
    try:
        theirs = email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return Finding("clock", "unknown", "EvoLink's time is not known, so the clock could not be compared")
    skew = now - theirs
    if abs(skew) > SKEW_MAX_S:
        way = "ahead of" if skew > 0 else "behind"
        return Finding(
            "clock", "warning", f"this clock is {abs(skew):.0f} s {way} EvoLink's",
            "Set it: lost answers are looked for by time, and links are kept for 24 h.",
        )  # fmt: skip
    return Finding("clock", "ok", f"within {max(abs(skew), 1):.0f} s of EvoLink's")


# --- folders and journal ---


def folders(settings: Settings) -> list[Finding]:
    """Pictures can be saved, and the folders that local files may come from exist."""
    output = settings.folders.output
    findings = [writable("pictures", output, "EVOLINK_MCP_OUTPUT_DIR")]
    for folder in settings.folders.allowed:
        if folder != output and not folder.is_dir():
            words = f"{folder} is allowed, but there is no such folder"
            findings.append(Finding("folders", "warning", words, "Make it, or correct EVOLINK_MCP_ALLOWED_DIRS."))
    read = ", ".join(str(folder) for folder in settings.folders.allowed)
    return [*findings, Finding("folders", "ok", f"local pictures are read from {read}")]


def writable(subject: str, folder: Path, variable: str) -> Finding:
    """A file can be made in `folder`, or in the nearest folder above it when it is not there yet."""
    there = next((above for above in (folder, *folder.parents) if above.exists()), folder)
    todo = f"Give the folder's rights or room back, or set {variable} to another one."
    try:
        with tempfile.TemporaryFile(dir=there):
            room = shutil.disk_usage(there).free
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return Finding(subject, "broken", f"{folder} cannot be written ({there}: {reason})", todo)
    if room < ROOM_MIN_BYTES:
        return Finding(subject, "warning", f"{folder} has only {room >> 20} MiB left", todo)
    return Finding(subject, "ok", str(folder) if there == folder else f"{folder} (made at the first picture)")


def journal(data_dir: Path) -> list[Finding]:
    """The journal can be opened; what it holds; whether files were set aside; whether it lies on a network drive."""
    findings = [writable("journal", data_dir, "EVOLINK_MCP_DATA_DIR")]
    path = data_dir / FILE_NAME
    if findings[0].verdict == "ok" and path.exists():
        findings = [_read(data_dir)]
    for aside in sorted(data_dir.glob(f"{path.name}.damaged-*[0-9a-f]")):
        findings.append(Finding(
            "journal", "warning", f"a damaged journal was set aside: {aside}",
            "Keep it until you know that no task is missing; list_tasks with sync=true asks EvoLink.",
        ))  # fmt: skip
    kind = file_system(data_dir)
    if kind in NETWORK_FILE_SYSTEMS:
        findings.append(Finding(
            "journal", "warning", f"{data_dir} is on a network file system ({kind}): SQLite is not safe there",
            "Set EVOLINK_MCP_DATA_DIR to a folder of this machine.",
        ))  # fmt: skip
    return findings


def _read(data_dir: Path) -> Finding:
    path = data_dir / FILE_NAME
    try:
        with path.open("rb") as file:
            begins = file.read(len(SQLITE_MAGIC))
        if begins not in (b"", SQLITE_MAGIC):
            todo = "Start the server: it sets the file aside, deletes nothing, and begins a new one."
            return Finding("journal", "broken", f"{path} is damaged", todo)
        entries = read_entries(data_dir, ENTRIES_MAX)
    except (OSError, JournalUnwritable) as error:
        words = error.message if isinstance(error, JournalUnwritable) else f"{path}: {error.strerror}"
        return Finding("journal", "broken", words, REFUSED)
    return _held(str(path), entries)


def team_journal(url: str) -> Finding:
    """The team's database can be read, and what it holds."""
    from evolink_mcp.teams import schema

    try:
        return _held(*schema.read_entries(url, ENTRIES_MAX))
    except JournalUnwritable as error:
        return Finding("journal", "broken", error.message, REFUSED)


def _held(place: str, entries: list[Entry]) -> Finding:
    unsettled = sum(not entry.ended for entry in entries)
    unclear = sum(entry.charged == "unknown" for entry in entries)
    words = f"{place}: {len(entries)} entries, {unsettled} not finished, {unclear} with unknown outcome"
    todo = "Ask your model for list_tasks with sync=true: it looks for them at EvoLink." if unclear else ""
    return Finding("journal", "ok", words, todo)


def file_system(path: Path, mounts: str | None = None) -> str | None:
    """The type of the file system that `path` lies on; None where it cannot be told (macOS, Windows drives)."""
    if str(path).startswith("\\\\"):
        return "cifs"
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(errors="replace")
        except OSError:
            return None
    real = path.resolve()
    best: tuple[int, str | None] = (-1, None)
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) > 2:
            point = Path(fields[1].replace("\\040", " "))
            if real.is_relative_to(point) and len(point.parts) >= best[0]:
                best = (len(point.parts), fields[2])
    return best[1]
