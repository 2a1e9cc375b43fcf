"""The HTML page of the command `sheet`: images by day, with a search. It loads no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime
from itertools import groupby
from pathlib import Path

from evolink_mcp.api.costs import format_credits
from evolink_mcp.journal.entry import Entry, ResultImage
from evolink_mcp.journal.rows import fold
from evolink_mcp.sanitize import harmless

PROMPT_MAX_CHARS = 300
# The row height before the images of a row grow to the width of the page. In pixels.
ROW_HEIGHT = 230

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1b19, #ece9e2); --paper: light-dark(#f7f5f0, #171614);
  --card: light-dark(#fff, #211f1c); --quiet: light-dark(#6b675f, #a09a8f); --line: light-dark(#d9d5cc, #3a3732); }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; }
h2 { font-size: 1rem; margin: 1.8rem 0 .6rem; }
header p, h2 span { color: var(--quiet); margin: 0; font-weight: normal; }
form { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem; margin: 1rem 0 0; }
input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .4rem .7rem; min-width: 0; }
input { flex: 1 1 14rem; max-width: 30rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
article { flex: var(--ratio) 1 max(150px, calc(var(--ratio) * var(--row))); min-width: min(150px, 100%);
  max-width: max(210px, calc(var(--ratio) * var(--row) * 1.6)); }
article:target figure { outline: 3px solid light-dark(#2f6fd0, #7eb0ff); }
figure { margin: 0; background: var(--card); border-radius: 10px; overflow: hidden; box-shadow: 0 1px 4px #0002; }
figure img { width: 100%; height: auto; display: block; }
figcaption { padding: .7rem .9rem .9rem; } figcaption p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
small { color: var(--quiet); display: block; overflow-wrap: anywhere; } small a { color: inherit; }
[hidden] { display: none; }
"""

# The search compares words as `evolink-mcp sheet` does: without case, accents and width.
SCRIPT = """
const fold = text => text.normalize("NFKD").replace(/\\p{M}/gu, "").toLowerCase();
const search = document.querySelector("input"), kind = document.querySelector("select");
const status = document.querySelector("output"), cards = [...document.querySelectorAll("article")];
const texts = new Map(cards.map(card => [card, fold(card.dataset.words)]));
function filter() {
  const words = fold(search.value).split(/\\s+/).filter(Boolean);
  for (const card of cards)
    card.hidden = !(words.every(word => texts.get(card).includes(word)) && (!kind.value || card.dataset.kind === kind.value));
  for (const day of document.querySelectorAll("section")) {
    const count = day.querySelectorAll("article:not([hidden])").length;
    day.hidden = !count;
    day.querySelector("h2 span").textContent = count === 1 ? "1 image" : `${count} images`;
  }
  const shown = cards.filter(card => !card.hidden).length;
  const text = shown ? `${shown} of ${cards.length} images` : "No image matches. Clear the search.";
  status.value = shown === cards.length ? "" : text;
}
document.querySelector("form").addEventListener("input", filter);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
"""


@dataclass(frozen=True, slots=True)
class Card:
    """One image of the page. `preview` is a WebP. `has_other_key`: another API key bought it."""

    entry: Entry
    image: ResultImage
    preview: bytes
    has_other_key: bool


def page_of(cards: Iterable[Card], title: str, sums: str, note: str = "") -> str:
    """Return the page. The cards are in the order of their time. `sums` and `note` are texts for its head."""
    cards = list(cards)
    anchors = {anchor for card in cards if (anchor := _anchor(card.entry.task_id, card.image.index))}
    sections = [
        _section(day, [_article(card, anchors) for card in group])
        for day, group in groupby(cards, key=lambda card: _moment(card).date())
    ]
    head = [f"<p>{html.escape(text)}</p>" for text in (f"{count_text(len(cards))}, {sums}", note) if text]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n"
        f"<header><h1>{html.escape(title)}</h1>{''.join(head)}"
        '<form><input type="search" aria-label="Search" placeholder="Search prompts and file names">'
        '<select aria-label="Kind of image"><option value="">All images</option><option value="new">From text</option>'
        '<option value="edit">Edits</option></select><output></output></form></header>\n<main>\n'
        + "\n".join(sections)
        + f"\n</main>\n<script>{SCRIPT}</script></html>\n"
    )


def count_text(images: int) -> str:
    """Return the number of images with its noun."""
    return "1 image" if images == 1 else f"{images:,} images"


def _section(day: date, articles: list[str]) -> str:
    # The format for a day without a leading zero differs between systems.
    heading = f"{day:%A}, {day.day} {day:%B %Y}"
    return (
        f"<section><h2>{heading} <span>{count_text(len(articles))}</span></h2>\n"
        '<div class="row">\n' + "\n".join(articles) + "\n</div></section>"
    )


def _article(card: Card, anchors: set[str]) -> str:
    entry = card.entry
    image = card.image
    path = Path(image.path or "")
    prompt = harmless(entry.request.get("prompt") or "", PROMPT_MAX_CHARS)
    width = image.width or 1
    height = image.height or 1
    data = base64.b64encode(card.preview).decode()
    facts = [
        html.escape(f"{_moment(card):%H:%M}, {image.width}×{image.height}, {_price(entry)}"),
        *_sources(entry, anchors),
        *(["bought with another key"] if card.has_other_key else []),
        html.escape(path.name),
    ]
    anchor = _anchor(entry.task_id, image.index)
    words = fold(" ".join([prompt, path.name, entry.task_id or ""]))
    return (
        f'<article id="{html.escape(anchor)}" data-kind="{"edit" if entry.references else "new"}" '
        f'data-words="{html.escape(words)}" style="--ratio:{width / height:.4f};--row:{ROW_HEIGHT}px">'
        f'<figure><a href="{html.escape(path.as_uri())}"><img loading="lazy" width="{width}" height="{height}" '
        f'alt="{html.escape(prompt)}" src="data:image/webp;base64,{data}"></a>'
        f"<figcaption><p>{html.escape(prompt)}</p>"
        + "".join(f"<small>{fact}</small>" for fact in facts)
        + "</figcaption></figure></article>"
    )


def _sources(entry: Entry, anchors: set[str]) -> list[str]:
    """Return a line of HTML for each image that was edited. It is a link if that image is on the page."""
    lines: list[str] = []
    for reference in entry.references:
        given = harmless(reference.given, PROMPT_MAX_CHARS)
        is_uri = given.startswith("evolink://images/")
        name = "an earlier image" if is_uri else html.escape(re.split(r"[\\/]", given)[-1])
        anchor = _anchor(reference.task_id, reference.index or 0)
        lines.append(
            f'edited from <a href="#{html.escape(anchor)}">{name}</a>' if anchor in anchors else f"edited from {name}"
        )
    return lines


def _price(entry: Entry) -> str:
    """Return the price of one image of the entry."""
    if entry.charge is None:
        return "price not decided"
    return format_credits(round(entry.charge / max(len(entry.images), 1), 4))


def _anchor(task_id: str | None, index: int) -> str:
    return f"{harmless(task_id, 200).replace(' ', '_')}-{index}" if task_id else ""


def _moment(card: Card) -> datetime:
    return datetime.fromtimestamp(card.entry.created_at)
