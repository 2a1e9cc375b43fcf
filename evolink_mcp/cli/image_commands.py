"""The commands `open` and `sheet`: open a saved image, or show many on one HTML page."""

from __future__ import annotations

import base64
import html
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import anyio

from evolink_mcp.api.costs import format_credits
from evolink_mcp.app.settings import decoder_environment, has_display
from evolink_mcp.errors import DecoderUnavailable, JournalUnwritable, Refused
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import open_plain, write_new_file
from evolink_mcp.images.unusable import UnusableImage
from evolink_mcp.journal.entry import Entry, ResultImage, account_id_of
from evolink_mcp.journal.journal import Sums
from evolink_mcp.journal.profile import DEFAULT_PROFILE
from evolink_mcp.journal.sqlite import FILE_NAME, read_accounts, read_entries, read_sums
from evolink_mcp.sanitize import harmless, printable
from evolink_mcp.studio.times import instant
from evolink_mcp.teams.settings import TeamSettings

Print = Callable[[str], None]

ALL_TIMES = "all"  # the value of --since that names no time
# The demo's journal, below the journal folder.
DEMO_JOURNAL = "demo"
SHEET_EDGE = 360  # pixels
SHEET_MAX = 200  # images
PREVIEW_MAX_BYTES = 200_000

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1b19, #ece9e2); --paper: light-dark(#f7f5f0, #171614);
  --card: light-dark(#fff, #211f1c); --quiet: light-dark(#6b675f, #a09a8f); }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } header p { color: var(--quiet); margin: 0 0 1.5rem; }
main { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 10px; overflow: hidden; box-shadow: 0 1px 4px #0002; }
figure a { display: block; aspect-ratio: 1; background: light-dark(#eceae4, #0f0e0d); }
figure img { width: 100%; height: 100%; object-fit: contain; display: block; }
figcaption { padding: .7rem .9rem .9rem; } figcaption p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
small { color: var(--quiet); display: block; overflow-wrap: anywhere; }
"""


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
    """Return the profile that the commands show. None: they show the entries of all tenants."""
    has_tenants = settings.database_url or settings.tokens_file or settings.oauth_issuer
    return None if has_tenants else settings.profile


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
        key_text=None,
        profile=DEFAULT_PROFILE,
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
    for entry in find_entries(settings, tuple(words), SHEET_MAX, start_of(since, time.time()))[1]:
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
) -> int:
    """Write an HTML page with the images since a time to a new private file. Return the exit code.

    Without a match, show the images of the demo. `path_text` returns a path as `report` can print it.
    """
    now = time.time()
    simulated = demo_settings(settings)
    try:
        start = start_of(since, now)
        page, count = _page(settings, words, since, start, complain)
        if not count:
            settings = simulated
            page, count = _page(settings, words, since, start, complain)
    except (JournalUnwritable, Refused) as error:
        complain(f"{error.message}. {error.advice}")
        return 1
    if not count:
        complain("no saved image matches; try --since 7d or --since all")
        return 1
    name = time.strftime("contact-sheet-%Y-%m-%d-%H%M%S.html", time.localtime(now))
    path = Path(out).absolute() if out else settings.folders.output / name
    try:
        is_written = write_new_file(path, page.encode("utf-8", "replace"))
    except OSError as error:
        complain(f"{path} is not writable ({error.strerror})")
        return 1
    if not is_written:
        complain(f"{path} exists already and is never overwritten. Give another name with --out")
        return 1
    report(f"{_count(count)}: {path_text(path)}")
    return 0


def _page(settings: TeamSettings, words: list[str], since: str, start: float, complain: Print) -> tuple[str, int]:
    """Return the HTML page of a journal, and its number of images.

    Raises:
        JournalUnwritable: the journal is damaged or unreadable.
    """
    _, entries = find_entries(settings, tuple(words), SHEET_MAX, start)
    (sums,) = find_sums(settings, [start], tuple(words))
    other_keys = find_other_keys(settings, entries)
    suffix = f" with “{harmless(' '.join(words), 80)}”" if words else ""
    title = f"All images{suffix}" if since == ALL_TIMES else f"Images since {harmless(since, 40)}{suffix}"
    if settings.data_dir.name == DEMO_JOURNAL:
        title += ", simulated"
    with closing(Decoder(decoder_environment())) as decoder:
        return anyio.run(_build_page, entries, other_keys, title, sums, complain, decoder)


async def _build_page(
    entries: list[Entry], other_keys: set[str], title: str, sums: Sums, complain: Print, decoder: Decoder
) -> tuple[str, int]:
    """Return an HTML page with a preview of each image, and the number of images. The page loads no other file.

    `other_keys` are those of `find_other_keys`.
    """
    cards: list[str] = []
    spent = f"spent {format_credits(sums.spent)}, reserved {format_credits(sums.reserved)}"
    for entry in entries:
        for image in entry.images:
            if image.path is None or not image.is_present or len(cards) >= SHEET_MAX:
                continue
            try:
                with open_plain(Path(image.path)) as file:
                    preview = await decoder.preview(file, edge=SHEET_EDGE, budget=PREVIEW_MAX_BYTES)
            except (UnusableImage, DecoderUnavailable, OSError) as error:
                complain(f"{printable(image.path)} is not on the page ({error})")
                continue
            if preview is not None:
                cards.append(_card(entry, image, preview, has_other_key=entry.key in other_keys))
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n<header><h1>{html.escape(title)}</h1>"
        f"<p>{_count(len(cards))}, {html.escape(spent)}</p></header>\n<main>\n"
        + "\n".join(cards)
        + "\n</main></html>\n"
    )
    return page, len(cards)


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _card(entry: Entry, image: ResultImage, preview: bytes, *, has_other_key: bool) -> str:
    path = Path(image.path or "")
    prompt = harmless(entry.request.get("prompt") or "", 300)
    created_at = datetime.fromtimestamp(entry.created_at).strftime("%Y-%m-%d %H:%M")
    data = base64.b64encode(preview).decode()
    sources = [re.split(r"[\\/]", harmless(reference.given, 300))[-1] for reference in entry.references]
    facts = [
        f"{created_at}, {image.width}×{image.height}",
        *(f"edited from {source}" for source in sources),
        *(["bought with another key"] if has_other_key else []),
        path.name,
    ]
    return (
        f'<figure><a href="{html.escape(path.as_uri())}"><img loading="lazy" alt="{html.escape(prompt)}" '
        f'src="data:image/webp;base64,{data}"></a><figcaption><p>{html.escape(prompt)}</p>'
        + "".join(f"<small>{html.escape(fact)}</small>" for fact in facts)
        + "</figcaption></figure>"
    )
