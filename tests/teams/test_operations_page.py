"""docs/operations.md: its commands run, and its tables, the alerts and the dashboard match the server."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sysconfig
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from child_processes import patient_times
from conftest import KEY
from test_replicas import ANNA, REQUEST, Team, open_team

pytest.importorskip("yaml")
pytest.importorskip("prometheus_client")

import yaml
from prometheus_client.parser import text_string_to_metric_families

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import Entry, new_key
from evolink_mcp.teams.database import open_database
from evolink_mcp.teams.postgres import PostgresJournal
from evolink_mcp.teams.schema import COMPATIBLE_WITH, VERSIONS, read_charges

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text("utf-8")
ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text("utf-8"))
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
]
RUNBOOKS = PAGE.split("\n## Runbooks\n")[1]


def rows(mark: str) -> list[list[str]]:
    """Return the cells of each row of a marked table."""
    table = PAGE.split(f"<!-- {mark}:begin -->\n")[1].split(f"<!-- {mark}:end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


# --- commands ---


def commands(name: str) -> str:
    """Return a marked block of commands."""
    match = re.search(rf"<!-- run:{name} -->\n *```sh\n(.*?)\n *```", PAGE, re.DOTALL)
    assert match is not None
    return textwrap.dedent(match[1])


async def run(name: str, folder: Path, **environ: str) -> str:
    """Run a block of commands. Return its output."""
    search_path = [sysconfig.get_path("scripts"), os.environ["PATH"]]
    result = await anyio.run_process(
        ["bash", "-e", "-o", "pipefail", "-c", commands(name)],
        cwd=folder,
        env={"PATH": os.pathsep.join(search_path), "HOME": str(folder), **environ},
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = result.stdout.decode()
    assert result.returncode == 0, output
    return output


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


async def test_a_restored_backup_has_all_purchases_and_a_server_continues_with_it(
    url: str, cluster: Any, tmp_path: Path
) -> None:
    async with open_team(url, tmp_path, ANNA) as team, team.client("a") as client:
        purchase = (await client.call_tool("generate_image", REQUEST)).structured_content
        backup = await run("backup", tmp_path, EVOLINK_MCP_DATABASE_URL=url)  # while the servers run
    restored_url = cluster.url("evolink_restored")
    settings = {"EVOLINK_API_KEY": KEY, "EVOLINK_MCP_SECRET": "s" * 32}
    output = await run("restore", tmp_path, ADMIN_URL=cluster.url("postgres"), RESTORED_URL=restored_url, **settings)
    assert "evolink_entries" in backup
    assert purchase["task_id"] in output
    assert read_charges(restored_url, 0.0) == read_charges(url, 0.0)
    async with open_team(restored_url, tmp_path, ANNA) as team, team.client("a") as client:
        task = (await client.call_tool("get_task", {"task_id": purchase["task_id"]})).structured_content
        spent = [(await client.call_tool("list_tasks", {})).structured_content["spent"]["today"]]
        new_purchase = (
            await client.call_tool("generate_image", {**REQUEST, "prompt": "sim:fast a hen"})
        ).structured_content
    assert (task["status"], task["credits"]) == ("completed", purchase["credits"])
    assert spent[0]["credits"] == purchase["credits"]
    assert new_purchase["status"] == "completed"


async def test_the_deletion_of_a_tenant_leaves_the_other_tenants(url: str, tmp_path: Path) -> None:
    async with open_database(url, patient_times()) as database:
        journals = {name: PostgresJournal(database, "a1", profile=name) for name in ("anna", "bert")}
        for journal in journals.values():
            entry = Entry(key=new_key(), owner=journal.owner, phase="submitted", created_at=1.0, account="a1")
            await journal.intend(replace(entry, estimate=2.0))
        await run("delete", tmp_path, EVOLINK_MCP_DATABASE_URL=url)
        counts = {name: len(await journal.recent(5)) for name, journal in journals.items()}
    assert counts == {"anna": 0, "bert": 1}
    with cluster_of(url) as db:
        for table in ("entries", "sums", "uploads", "links"):
            assert db.execute(f"SELECT count(*) FROM evolink_{table} WHERE profile = 'anna'").fetchone() == (0,)


@contextmanager
def cluster_of(url: str) -> Iterator[Any]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as db:
        yield db


async def test_a_server_continues_at_the_promoted_standby(tmp_path: Path) -> None:
    from cluster import find_programs, run_cluster

    if find_programs() is None:
        pytest.skip("needs PostgreSQL, for example Debian's package postgresql")
    with run_cluster() as primary, primary.standby() as standby:
        url = primary.database()
        name = url.partition("@/")[2].partition("?")[0]
        both_url = (
            f"postgresql://postgres@/{name}?host={primary.folder},{standby.folder}&target_session_attrs=read-write"
        )
        async with open_database(both_url, patient_times()) as database:
            journal = PostgresJournal(database, "a1")
            await journal.intend(Entry(key=new_key(), owner=database.owner, phase="submitted", created_at=1.0))
            with primary.admin(name) as db:
                (position,) = db.execute("SELECT pg_current_wal_lsn()").fetchone() or ("",)
            with standby.admin() as db:  # the database may not be there yet
                while db.execute("SELECT pg_last_wal_replay_lsn() < %s::pg_lsn", (position,)).fetchone() == (True,):
                    await anyio.sleep(0.05)
            await anyio.to_thread.run_sync(primary.stop)
            try:
                output = await run("promote", tmp_path, STANDBY_URL=standby.url(name))
                entries: list[Entry] = []
                while not entries:
                    try:
                        entries = await journal.recent(5)
                    except JournalUnwritable:
                        await anyio.sleep(0.05)
                await journal.intend(Entry(key=new_key(), owner=database.owner, phase="submitted", created_at=2.0))
                assert len(await journal.recent(5)) == 2
            finally:
                primary.start()
    assert output.split()[-1] == "f"


# --- metrics, alerts and dashboard ---


async def families_of(team: Team) -> dict[str, set[str]]:
    """Return the names of all samples at /metrics with their labels. A counter without a value has no label yet."""
    async with team.http("a") as http:
        text = (await http.get("/metrics")).text
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "info": ["_info"]}
    families: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for suffix in suffixes.get(family.type, [""]):
            families[family.name + suffix] = set()
        for sample in family.samples:
            families.setdefault(sample.name, set()).update(sample.labels)
    return families


async def all_families(url: str, folder: Path) -> dict[str, set[str]]:
    async with open_team(url, folder, ANNA) as team, team.client("a") as client:
        await client.call_tool("generate_image", REQUEST)
        await client.call_tool("generate_image", {**REQUEST, "prompt": "sim:slow=3600 a hen", "wait_seconds": 0})
        labels_of: dict[str, set[str]] = {}
        for _ in team.proxy.apps:
            for name, labels in (await families_of(team)).items():
                labels_of.setdefault(name, set()).update(labels)
        return labels_of


async def test_the_page_lists_every_metric_with_its_labels(url: str, tmp_path: Path) -> None:
    families = await all_families(url, tmp_path)
    listed_metrics = {name.strip("`"): set(re.findall(r"`(\w+)`", labels)) for name, labels, _ in rows("metrics")}
    lag = "evolink_lag_seconds"
    parts = {f"{lag}_bucket", f"{lag}_count", f"{lag}_sum"}
    served_metrics = {
        name: labels for name, labels in families.items() if name not in parts and not name.endswith("_created")
    }
    assert listed_metrics == {**served_metrics, lag: families[f"{lag}_bucket"]}


async def test_alerts_and_dashboard_use_existing_metrics_and_labels(url: str, tmp_path: Path) -> None:
    families = await all_families(url, tmp_path)
    assert len(EXPRESSIONS) > 30
    for expression in EXPRESSIONS:
        names = re.findall(r"\bevolink_\w+", expression)
        assert names, expression
        assert set(names) <= set(families), expression
        known_labels = set().union(*(families[name] for name in names)) | {"instance"}
        used_labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
        used_labels += re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", expression)))
        assert set(used_labels) <= known_labels, expression


async def test_every_metric_is_on_the_dashboard() -> None:
    shown_metrics = set(re.findall(r"\bevolink_\w+", " ".join(EXPRESSIONS)))
    missing = {name.strip("`") for name, *_ in rows("metrics")} - shown_metrics
    assert missing == {"evolink_lag_seconds"}  # the dashboard shows its buckets
    assert "evolink_lag_seconds_bucket" in shown_metrics


async def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert re.findall(r"^### (\w+)$", RUNBOOKS, re.MULTILINE) == sorted(names, key=names.index) == names
    for rule in ALERTS:
        url = rule["annotations"]["runbook_url"]
        assert url.endswith(f"/docs/operations.md#{rule['alert'].lower()}")
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
    for section in RUNBOOKS.split("\n### ")[1:]:
        assert re.search(r"^(1\.|-) ", section, re.MULTILINE), section[:40]


async def test_the_panels_of_the_dashboard_have_different_places() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


# --- sizes, schemas and sections ---


def number(text: str) -> float:
    """Return the number at the start of a cell."""
    match = re.match(r"[\d,.]+", text)
    assert match is not None, text
    return float(match[0].replace(",", ""))


async def test_the_table_of_sizes_follows_from_the_measured_figures() -> None:
    units = {name: number(value) for name, value, _ in rows("units")}
    rate = units["orders per second of one server, all processes on two cores"]
    idle_mb = units["memory of an idle server"] + units["memory of the decoder"]
    cpu_ms = units["CPU time of the servers per order"]
    assert units["orders per second of one server with its own core"] == pytest.approx(1000 / cpu_ms, abs=1)
    for row in rows("sizes"):
        orders, waiting, servers, memory_mb, transactions, writes = map(number, row)
        assert waiting == 50 * orders
        assert servers == math.ceil(orders / rate) + 1
        needed_mb = idle_mb + units["memory per waiting caller"] * waiting / (servers - 1)
        assert needed_mb <= memory_mb <= needed_mb + 20
        assert transactions == orders * units["transactions of PostgreSQL per order"]
        assert writes == orders * units["writes of PostgreSQL's log to the disk per order"]


async def test_the_table_of_schemas_has_every_version_and_its_compatible_programs() -> None:
    table = rows("schemas")
    assert [int(version) for version, *_ in table] == list(range(1, len(VERSIONS) + 1))
    for version, _, older in table:
        oldest = COMPATIBLE_WITH.get(int(version))
        assert (older == "none") == (oldest is None)
        assert oldest is None or f"schema {oldest}" in older


async def test_the_contents_and_the_links_of_the_page_match_its_sections() -> None:
    titles = re.findall(r"^#{2,3} (.*)$", PAGE, re.MULTILINE)
    anchors = {title.lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= anchors
    contents = re.findall(r"^- \[[^\]]*\]\(#([^)]*)\)$", PAGE, re.MULTILINE)
    assert contents == [title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)]
