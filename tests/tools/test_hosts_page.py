"""docs/hosts.md says for each known host where a person sees the connection."""

from __future__ import annotations

import re
from pathlib import Path

from evolink_mcp.tools.hosts import HOSTS, UNKNOWN

DOCUMENT = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")


def test_every_host_has_a_row_about_its_connection() -> None:
    table = DOCUMENT.split("<!-- connection:begin -->\n")[1].split("<!-- connection:end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [host.name for _, host in HOSTS] + [UNKNOWN.name]
    assert [row[0] for row in rows if len(row) != 2 or not row[1]] == []


def test_every_link_of_the_page_to_a_heading_leads_to_one() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in DOCUMENT.splitlines()
        if line.startswith("#")
    }
    assert {link for link in re.findall(r"\]\(#([^)]+)\)", DOCUMENT) if link not in headings} == set()
