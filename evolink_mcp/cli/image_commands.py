"""Find saved pictures again: open one or its folder, or lay many out on one page (`open` and `sheet`)."""

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
from datetime import datetime
from pathlib import Path

import anyio

from evolink_mcp.api.costs import priced
from evolink_mcp.app.settings import decoder_environment, has_display
from evolink_mcp.errors import DecoderUnavailable, JournalUnwritable, Refused
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import open_plain, write_new_file
from evolink_mcp.images.unusable import UnusableImage
from evolink_mcp.journal.entry import Entry, ResultImage
from evolink_mcp.journal.file import FILE_NAME
from evolink_mcp.journal.sqlite import read_entries
from evolink_mcp.sanitize import harmless
from evolink_mcp.studio.times import instant
from evolink_mcp.teams.settings import TeamSettings

Say = Callable[[str], None]

SHEET_EDGE = 360  # pixels
SHEET_MAX = 200  # pictures
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


def kept(settings: TeamSettings, words: tuple[str, ...], limit: int, since: float = 0.0) -> tuple[str, list[Entry]]:
    """Where the journal lies, and its newest entries since then (epoch seconds) with every word, newest first; blocks.

    A word is searched in the prompt, the file names and the task id.

    Raises:
        JournalUnwritable: the journal is damaged or cannot be read.
    """
    if settings.database_url is not None:
        from evolink_mcp.teams import schema

        return schema.read_entries(settings.database_url, limit, words, since)
    path = settings.data_dir / FILE_NAME
    return str(path), read_entries(settings.data_dir, limit, words, since) if path.exists() else []


def open_picture(settings: TeamSettings, words: list[str], say: Say, complain: Say, *, only_print: bool) -> int:
    """Show the newest picture with these words, or the folder; returns the exit code."""
    try:
        path = picture_of(settings, words)
    except JournalUnwritable as error:
        complain(error.message)
        return 1
    if words and path == settings.folders.output:
        complain(
            f"no saved picture has “{harmless(' '.join(words), 80)}” in its prompt, its file's name or its task's id"
        )
        return 1
    if not path.exists():
        complain(f"nothing was saved yet; pictures will be in {path}")
        return 1
    say(str(path))
    if not only_print and not show(path):
        complain("no program here can show it")
    return 0


def lay_out(settings: TeamSettings, words: list[str], since: str, out: str | None, say: Say, complain: Say) -> int:
    """Write one page with the pictures since then, to a new private file. Return the exit code."""
    now = time.time()
    try:
        _, entries = kept(settings, tuple(words), SHEET_MAX, 0.0 if since == "all" else instant(since, now))
    except (JournalUnwritable, Refused) as error:
        complain(f"{error.message}. {error.advice}")
        return 1
    which = f" with “{harmless(' '.join(words), 80)}”" if words else ""
    title = f"All pictures{which}" if since == "all" else f"Pictures since {harmless(since, 40)}{which}"
    with closing(Decoder(decoder_environment())) as decoder:
        page, count = anyio.run(sheet, entries, title, complain, decoder)
    if not count:
        complain("there is no saved picture to show; try --since 7d or --since all")
        return 1
    name = time.strftime("contact-sheet-%Y-%m-%d-%H%M%S.html", time.localtime(now))
    path = Path(out).absolute() if out else settings.folders.output / name
    try:
        is_written = write_new_file(path, page.encode("utf-8", "replace"))
    except OSError as error:
        complain(f"{path} cannot be written ({error.strerror})")
        return 1
    if not is_written:
        complain(f"{path} exists already and is never overwritten. Give another name with --out")
        return 1
    say(f"{'1 picture' if count == 1 else f'{count} pictures'}: {path}")
    return 0


def picture_of(settings: TeamSettings, words: list[str]) -> Path:
    """The newest saved picture with these words that is still there; without words, or without one, the folder."""
    if words:
        for entry in kept(settings, tuple(words), SHEET_MAX)[1]:
            for picture in entry.images:
                if picture.path is not None and picture.is_present:
                    return Path(picture.path)
    return settings.folders.output


def show(path: Path) -> bool:
    """Open a file or folder with the system's own program; False where there is none."""
    if sys.platform == "win32":
        os.startfile(path)
        return True
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if opener is None or (sys.platform == "linux" and not has_display()):
        return False
    done = subprocess.run([opener, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0


async def sheet(entries: list[Entry], title: str, log: Say, decoder: Decoder) -> tuple[str, int]:
    """Return one HTML page with a small copy of each image, and the number of images. The page loads nothing else."""
    cards: list[str] = []
    spent = 0.0
    for entry in entries:
        spent += entry.task.credits_used or 0.0 if entry.task else 0.0
        for picture in entry.images:
            if picture.path is None or not picture.is_present or len(cards) >= SHEET_MAX:
                continue
            try:
                with open_plain(Path(picture.path)) as file:
                    small = await decoder.preview(file, edge=SHEET_EDGE, budget=PREVIEW_MAX_BYTES)
            except (UnusableImage, DecoderUnavailable, OSError) as error:
                log(f"{picture.path} is left out ({error})")
                continue
            if small is not None:
                cards.append(_card(entry, picture, small))
    count = "1 picture" if len(cards) == 1 else f"{len(cards)} pictures"
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n<header><h1>{html.escape(title)}</h1>"
        f"<p>{count}, {html.escape(priced(round(spent, 4)))}</p></header>\n<main>\n"
        + "\n".join(cards)
        + "\n</main></html>\n"
    )
    return page, len(cards)


def _card(entry: Entry, picture: ResultImage, small: bytes) -> str:
    path = Path(picture.path or "")
    prompt = harmless(entry.request.get("prompt") or "", 300)
    when = datetime.fromtimestamp(entry.created_at).strftime("%Y-%m-%d %H:%M")
    data = base64.b64encode(small).decode()
    sources = [re.split(r"[\\/]", harmless(one.given, 300))[-1] for one in entry.references]
    made_from = [f"edited from {source}" for source in sources]
    facts = [f"{when}, {picture.width}×{picture.height}", *made_from, path.name]
    return (
        f'<figure><a href="{html.escape(path.as_uri())}"><img loading="lazy" alt="{html.escape(prompt)}" '
        f'src="data:image/webp;base64,{data}"></a><figcaption><p>{html.escape(prompt)}</p>'
        + "".join(f"<small>{html.escape(fact)}</small>" for fact in facts)
        + "</figcaption></figure>"
    )
