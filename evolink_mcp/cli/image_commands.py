"""The commands `open` and `sheet`: open a saved image, or show many on one HTML page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import anyio

from evolink_mcp.api.costs import format_credits
from evolink_mcp.app.environment import decoder_environment, has_display
from evolink_mcp.cli.sheet_page import Card, count_text, page_of
from evolink_mcp.errors import DecoderUnavailable, JournalUnwritable, Refused
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import open_plain, write_new_file
from evolink_mcp.images.unusable import UnusableImage
from evolink_mcp.journal.entry import Entry, account_id_of
from evolink_mcp.journal.journal import Charge, Sums
from evolink_mcp.journal.sqlite import FILE_NAME, read_accounts, read_charges, read_entries, read_sums
from evolink_mcp.sanitize import harmless, printable
from evolink_mcp.studio.times import instant
from evolink_mcp.teams.settings import TeamSettings

Print = Callable[[str], None]

ALL_TIMES = "all"  # the value of --since that names no time
# The demo's journal, below the journal folder.
DEMO_JOURNAL = "demo"
SHEET_EDGE = 360  # pixels
SHEET_MAX = 1_000  # images
OPEN_MAX = 200  # entries that `open` reads
PREVIEW_MAX_BYTES = 200_000


def find_entries(
    settings: TeamSettings, words: tuple[str, ...], limit: int, since: float = 0.0
) -> tuple[str, list[Entry]]:
    """Return the place of the journal and its newest entries since a time (epoch seconds). Blocks.

    Each word must occur in the prompt, a file name or the task ID.

    Raises:
        JournalUnwritable: the journal is damaged or unreadable.
    """
    if settings.database_url is not None:
        from evolink_mcp.teams import schema

        return schema.read_entries(settings.database_url, limit, words, since)
    path = settings.data_dir / FILE_NAME
    if not path.exists():
        return str(path), []
    return str(path), read_entries(settings.data_dir, limit, words, since, profile=_profile_of(settings))


def find_sums(settings: TeamSettings, since: list[float], words: tuple[str, ...] = ()) -> list[Sums]:
    """Return the sums of the entries since each of these times (epoch seconds), as `find_entries` finds them. Blocks.

    Raises:
        JournalUnwritable: the journal is damaged or unreadable.
    """
    if settings.database_url is not None:
        from evolink_mcp.teams import schema

        return schema.read_sums(settings.database_url, since, words)
    has_journal = (settings.data_dir / FILE_NAME).exists()
    if not has_journal:
        return [Sums() for _ in since]
    return read_sums(settings.data_dir, since, words, profile=_profile_of(settings))


def find_charges(settings: TeamSettings, since: float) -> list[Charge]:
    """Return the charges since a time (epoch seconds). A team's journal has those of all tenants. Blocks.

    Raises:
        JournalUnwritable: the journal is damaged or unreadable.
    """
    if settings.database_url is not None:
        from evolink_mcp.teams import schema

        return schema.read_charges(settings.database_url, since)
    if not (settings.data_dir / FILE_NAME).exists():
        return []
    return read_charges(settings.data_dir, since, profile=_profile_of(settings))


def find_other_keys(settings: TeamSettings, entries: list[Entry]) -> set[str]:
    """Return the keys of the entries that another API key of the profile bought. Blocks. Empty without an API key.

    Raises:
        JournalUnwritable: the journal is damaged or unreadable.
    """
    profile = _profile_of(settings)
    if profile is None or settings.key is None or not entries:
        return set()
    identity = account_id_of(settings.key.get_secret_value(), settings.base_url)
    accounts = read_accounts(settings.data_dir, profile, identity)
    return {entry.key for entry in entries if entry.account not in accounts}


def _profile_of(settings: TeamSettings) -> str | None:
    """Return the profile that the commands show. None: they show the entries of all tenants, or of all demos."""
    has_tenants = settings.database_url or settings.tokens_file or settings.oauth_issuer
    return None if has_tenants or _is_demo(settings) else settings.profile


def _is_demo(settings: TeamSettings) -> bool:
    return settings.data_dir.name == DEMO_JOURNAL


def start_of(since: str, now: float) -> float:
    """Return the start of a period in epoch seconds: ALL_TIMES, or a time as `instant` reads it.

    Raises:
        Refused: the text is not such a time.
    """
    return 0.0 if since == ALL_TIMES else instant(since, now)


def demo_folder(output: Path) -> Path:
    """Return the output folder of the demo. Simulated images never mix with bought ones."""
    is_simulated = "simulated" in output.name.lower()
    return output if is_simulated else output.with_name(f"{output.name} simulated")


def demo_settings(settings: TeamSettings) -> TeamSettings:
    """Return the settings with the journal and the output folder of the demo."""
    return replace(
        settings,
        data_dir=settings.data_dir / DEMO_JOURNAL,
        output_dir=demo_folder(settings.output_dir),
        # Each demo is another account, so with a key every earlier image would count as that of another key.
        key_text=None,
        database_url=None,
        tokens_file=None,
        oauth_issuer=None,
    )


def open_image(
    settings: TeamSettings,
    words: list[str],
    report: Print,
    complain: Print,
    *,
    since: str = ALL_TIMES,
    only_print: bool,
) -> int:
    """Open the newest image with these words, or the output folder. Return the exit code.

    Without a match, open the image or folder of the demo.
    """
    try:
        path = _find_path(settings, words, since) or _find_path(demo_settings(settings), words, since)
    except (JournalUnwritable, Refused) as error:
        complain(f"{error.message}. {error.advice}")
        return 1
    if path is None:
        found_by = f"no saved image has “{harmless(' '.join(words), 80)}” in its prompt, file name or task ID"
        complain(found_by if words else f"no image is saved yet; the output folder is {settings.folders.output}")
        return 1
    report(str(path))
    if not only_print and not _show(path):
        complain("no program of this system can open it")
    return 0


def _find_path(settings: TeamSettings, words: list[str], since: str) -> Path | None:
    """Return the newest image, or without words and time the existing output folder."""
    if not words and since == ALL_TIMES:
        output = settings.folders.output
        return output if output.exists() else None
    for entry in find_entries(settings, tuple(words), OPEN_MAX, start_of(since, time.time()))[1]:
        for image in entry.images:
            if image.path is not None and image.is_present:
                return Path(image.path)
    return None


def _show(path: Path) -> bool:
    """Open a file or folder with the program of the system. Return False if it has none."""
    if sys.platform == "win32":
        try:
            os.startfile(path)
        except OSError:  # no program is associated with the type
            return False
        return True
    program = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    # Without a desktop xdg-open can start a text program in the terminal.
    if program is None or (sys.platform == "linux" and not has_display()):
        return False
    try:
        result = subprocess.run([program, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    return result.returncode == 0


def write_sheet(
    settings: TeamSettings,
    words: list[str],
    since: str,
    out: str | None,
    report: Print,
    complain: Print,
    path_text: Callable[[Path], str] = printable,
    images_max: int = SHEET_MAX,
) -> int:
    """Write an HTML page with the images since a time to a new private file. Return the exit code.

    Without a match, show the images of the demo. `path_text` returns a path as `report` can print it.
    """
    now = time.time()
    simulated = demo_settings(settings)
    try:
        start = start_of(since, now)
        page, count = _page(settings, words, since, start, complain, images_max)
        if not count:
            settings = simulated
            page, count = _page(settings, words, since, start, complain, images_max)
    except (JournalUnwritable, Refused) as error:
        complain(f"{error.message}. {error.advice}")
        return 1
    if not count:
        complain("no saved image matches; try --since 7d or --since all")
        return 1
    name = time.strftime("contact-sheet-%Y-%m-%d-%H%M%S.html", time.localtime(now))
    path = Path(out).absolute() if out else settings.folders.output / name
    try:
        # A prompt or a path can contain a lone surrogate.
        is_written = write_new_file(path, page.encode("utf-8", "replace"))
    except OSError as error:
        complain(f"{path} is not writable ({error.strerror})")
        return 1
    if not is_written:
        complain(f"{path} exists already and is never overwritten. Give another name with --out")
        return 1
    report(f"{count_text(count)}: {path_text(path)}")
    return 0


def _page(
    settings: TeamSettings, words: list[str], since: str, start: float, complain: Print, images_max: int
) -> tuple[str, int]:
    """Return the HTML page of a journal, and its number of images: the newest ones, at most `images_max`.

    Raises:
        JournalUnwritable: the journal is damaged or unreadable.
    """
    # One entry more than the page can show reveals that the page is incomplete.
    _, entries = find_entries(settings, tuple(words), images_max + 1, start)
    (sums,) = find_sums(settings, [start], tuple(words))
    other_keys = find_other_keys(settings, entries)
    suffix = f" with “{harmless(' '.join(words), 80)}”" if words else ""
    title = f"All images{suffix}" if since == ALL_TIMES else f"Images since {harmless(since, 40)}{suffix}"
    if _is_demo(settings):
        title += ", simulated"
    with closing(Decoder(decoder_environment())) as decoder:
        return anyio.run(_build_page, entries, other_keys, title, sums, complain, decoder, images_max)


async def _build_page(
    entries: list[Entry],
    other_keys: set[str],
    title: str,
    sums: Sums,
    complain: Print,
    decoder: Decoder,
    images_max: int,
) -> tuple[str, int]:
    """Return the page with a preview of each image, at most `images_max`, and the number of images.

    `other_keys` are those of `find_other_keys`.
    """
    images = [
        (entry, image) for entry in entries for image in entry.images if image.path is not None and image.is_present
    ]
    cards: list[Card] = []
    for entry, image in images[:images_max]:
        assert image.path is not None
        try:
            with open_plain(Path(image.path)) as file:
                preview = await decoder.preview(file, edge=SHEET_EDGE, budget=PREVIEW_MAX_BYTES)
        except (UnusableImage, DecoderUnavailable, OSError) as error:
            complain(f"{printable(image.path)} is not on the page ({error})")
            continue
        if preview is not None:
            cards.append(Card(entry, image, preview, entry.key in other_keys))
    note = ""
    if len(images) > images_max or len(entries) > images_max:
        note = f"The page has the newest {images_max:,} images. Give words or a shorter --since for others."
        complain(note)
    spent = f"spent {format_credits(sums.spent)}, reserved {format_credits(sums.reserved)}"
    return page_of(cards, title, spent, note), len(cards)
