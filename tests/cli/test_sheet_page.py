"""The page of `sheet`: days, prices, sources of edits, and every image."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from child_processes import minimal_environment
from conftest import Open, World

from evolink_mcp.cli.image_commands import write_sheet
from evolink_mcp.cli.sheet_page import Card, page_of
from evolink_mcp.journal.entry import Entry, Phase, ResultImage, new_key

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
DAY = datetime(2026, 11, 28, 10, 30).timestamp()
SIZE = {"width": 1600, "height": 900}


async def buy(world: World, prompt: str, **arguments: Any) -> dict[str, Any]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": f"sim:fast {prompt}", **arguments})
    return answer.structured_content


async def sheet(world: World, name: str, **options: Any) -> tuple[str, list[str]]:
    """Return the page and the error lines of `sheet`."""
    errors: list[str] = []
    out = world.folder / name
    code = await anyio.to_thread.run_sync(
        lambda: write_sheet(world.settings, [], "all", str(out), [].append, errors.append, **options)
    )
    assert code == 0
    return out.read_text("utf-8"), errors


def card(folder: Path, number: int) -> Card:
    entry = Entry(
        key=new_key(), owner="", phase=Phase.INTENT, created_at=DAY - number * 3600, request={"prompt": f"fox {number}"}
    )
    return Card(entry, ResultImage(0, "", 0.0, path=str(folder / f"fox-{number}.png"), **SIZE), b"webp", False)


async def test_a_page_has_every_image_below_the_heading_of_its_day(tmp_path: Path) -> None:
    page = page_of([card(tmp_path, number) for number in range(210)], "All images", "spent 0 credits")
    assert [f"fox-{number}.png" in page for number in range(210)] == [True] * 210
    headings = re.findall(r"<h2>(.+?) <span>(\d+) images?</span>", page)
    assert headings[:2] == [("Saturday, 28 November 2026", "11"), ("Friday, 27 November 2026", "24")]
    assert sum(int(count) for _, count in headings) == 210


async def test_an_image_keeps_its_shape_so_that_no_bars_surround_it(tmp_path: Path) -> None:
    page = page_of([card(tmp_path, 1)], "All images", "")
    assert 'width="1600" height="900"' in page
    assert "--ratio:1.7778" in page
    assert "object-fit" not in page


async def test_each_image_has_its_price_and_an_edit_links_to_its_source(open_world: Open) -> None:
    async with open_world() as world:
        fox = await buy(world, "a fox", n=2)
        await buy(world, "a fox at night", image_urls=[fox["images"][1]["path"]])
        page, errors = await sheet(world, "sheet.html")
    price = f"{round(fox['credits'] / 2, 4):g} credits"
    assert page.count(price) == 2
    (anchor,) = re.findall(r'edited from <a href="#([^"]+)">', page)
    assert anchor == f"{fox['task_id']}-1"
    assert page.count(f'id="{anchor}"') == 1
    assert (page.count('data-kind="edit"'), page.count('data-kind="new"'), errors) == (1, 2, [])


async def test_a_page_without_all_images_says_so(open_world: Open) -> None:
    async with open_world() as world:
        for prompt in ("a fox", "a hare", "an owl"):
            await buy(world, prompt)
        page, notes = await sheet(world, "two.html", images_max=2)
        complete_page, no_notes = await sheet(world, "three.html", images_max=3)
    note = "The page has the newest 2 images. Give words or a shorter --since for others."
    assert (page.count("<figure>"), note in page, notes) == (2, True, [note])
    assert "a fox" not in page
    assert (complete_page.count("<figure>"), no_notes) == (3, [])


async def test_text_of_a_prompt_is_no_html(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    original = card(tmp_path, 1)
    hostile_card = replace(original, entry=replace(original.entry, request={"prompt": hostile}))
    page = page_of([hostile_card], hostile, hostile, hostile)
    assert page.count("<script>") == 1
    assert "alert(1)</script>" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "status"),
    [("CAFE sign", "1 of 3 images"), ("fox", ""), ("badger", "No image matches. Clear the search."), ("", "")],
)
async def test_the_search_of_the_page_ignores_case_and_accents(tmp_path: Path, search: str, status: str) -> None:
    """Chromium runs the page's script."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium")
    cards = [card(tmp_path, number) for number in range(3)]
    cards[1] = replace(cards[1], entry=replace(cards[1].entry, request={"prompt": "Café sign with a fox"}))
    step = f"search.value = {search!r}; filter();"
    page = page_of(cards, "All images", "").replace("</html>", f"<script>{step}</script></html>")
    file = tmp_path / "page.html"
    file.write_text(page, "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    env = minimal_environment(tmp_path)  # Chromium writes into its home
    process = await anyio.run_process([chromium, *options, file.as_uri()], stderr=subprocess.DEVNULL, env=env)
    text = process.stdout.decode()
    assert f"<output>{status}</output>" in text
    shown_count = len(re.findall(r"<article(?![^>]* hidden)", text))
    assert shown_count == {"1 of 3 images": 1, "": 3}.get(status, 0)
