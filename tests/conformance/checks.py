"""The official conformance suite and the MCP Inspector against this server: checks.py PYTHON WORK."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "clients"))
from stage import PATH, TRANSPORTS, Score, Stage, npm_install  # noqa: E402

AT_ONCE = 2
WITHIN_S = 300
TOOL_ERROR = 5  # what the Inspector leaves with when a tool's answer is an error
TOOLS = {"generate_image", "get_task", "compute_size", "view_image", "list_tasks", "get_balance"}


def conformance(stage: Stage, modules: Path, score: Score) -> None:
    """Every scenario for servers at every version, each judged by scenarios.toml."""
    known = tomllib.loads((HERE / "scenarios.toml").read_text())
    for version, must_pass in known["must_pass"].items():
        results = stage.work / f"conformance-{version}"
        told = _node(stage, modules, "@modelcontextprotocol/conformance/dist/index.js", "server", "--url", stage.url("http"),
                     "--suite", "all", "--spec-version", version, "-o", str(results))  # fmt: skip
        seen = {_scenario(folder): _checks(folder) for folder in results.glob("server-*")}
        if not seen:
            score.tell(f"conformance {version}", (told.stdout + told.stderr)[-400:] or "no results")
        for name in sorted(seen.keys() | set(must_pass)):
            problem, remark = "not in scenarios.toml: does it apply to this server?", ""
            if name in must_pass:
                problem, remark = _failures(seen.get(name), known["excused"]), _count(seen.get(name))
            elif name in known["not_ours"]:
                continue
            score.tell(f"conformance {version} {name}", problem, remark)
        # Whatever a scenario wanted, what was said to it must be well-formed.
        aside = {name: checks for name, checks in seen.items() if name not in must_pass}
        broken = [name for name, checks in aside.items() if _status(checks, "wire-schema-valid") == "FAILURE"]
        score.tell(f"conformance {version} every answer fits the schema", ", ".join(broken),
                   f"also in {len(aside)} scenarios set aside, with reasons in scenarios.toml")  # fmt: skip


def _scenario(folder: Path) -> str:
    """`server-NAME-2026-11-22T22-29-15-627Z`, a folder of results, is named NAME."""
    return folder.name.removeprefix("server-").rsplit("-", 6)[0]


def _checks(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "checks.json").read_text())


def _status(checks: list[dict[str, Any]], name: str) -> str | None:
    return next((check["status"] for check in checks if check["id"] == name), None)


def _failures(checks: list[dict[str, Any]] | None, excused: dict[str, str]) -> str:
    if checks is None:
        return "did not run"
    bad = [check for check in checks if check["status"] == "FAILURE" and check["id"] not in excused]
    return "; ".join(f"{check['id']}: {check.get('errorMessage', '')}" for check in bad)


def _count(checks: list[dict[str, Any]] | None) -> str:
    good = sum(check["status"] == "SUCCESS" for check in checks or ())
    return f"{good} checks" if good else "nothing to check: the server keeps no sessions"


def inspector(stage: Stage, modules: Path, score: Score) -> None:
    """Strict listing in both eras, calls, and a refused call, over every transport."""

    def look(*said: str, transport: str, method: str, era: str = "auto") -> subprocess.CompletedProcess[str]:
        where = [stage.url(transport)] if transport != "stdio" else []
        environment = [part for name, value in stage.server_env.items() for part in ("-e", f"{name}={value}")]
        server = [*environment, "--", *stage.command] if transport == "stdio" else []
        return _node(stage, modules, "@modelcontextprotocol/inspector/clients/launcher/build/index.js", "--cli", *where,
                     "--method", method, "--protocol-era", era, "--format", "json", *said, *server)  # fmt: skip

    def call(transport: str, tool: str, arguments: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        said = ("--tool-name", tool, "--tool-args-json", json.dumps(arguments))
        return look(*said, transport=transport, method="tools/call")

    def listing(transport: str, era: str) -> tuple[str, str]:
        told = look("--strict", transport=transport, method="tools/list", era=era)
        if told.returncode:
            return _said(told), ""
        tools = _answer(told)["tools"]
        lacking = TOOLS - {tool["name"] for tool in tools}
        return f"lacks {sorted(lacking)}" if lacking else "", f"{len(tools)} tools"

    def sizing(transport: str) -> tuple[str, str]:
        told = call(transport, "compute_size", {"size": "16:9", "resolution": "2K"})
        if told.returncode:
            return _said(told), ""
        facts = _answer(told)["structuredContent"]
        good = (facts["width"], facts["height"]) == (2048, 1152)
        return ("" if good else f"answered {facts}"), facts["explicit_size"]

    def making(transport: str) -> tuple[str, str]:
        told = call(transport, "generate_image", {"prompt": f"A harbour for the inspector over {transport}"})
        if told.returncode:
            return _said(told), ""
        path = Path(_answer(told)["structuredContent"]["images"][0]["path"])
        return ("" if path.is_file() and path.is_relative_to(stage.pictures) else f"no picture at {path}"), path.name

    def refusing(transport: str) -> tuple[str, str]:
        told = call(transport, "compute_size", {"siez": "16:9"})
        good = told.returncode == TOOL_ERROR and "did you mean size" in told.stdout + told.stderr
        return ("" if good else _said(told)), f"exit code {told.returncode}"

    jobs = [(f"inspector tools/list --strict {era} {transport}", listing, (transport, era))
            for transport in TRANSPORTS for era in ("legacy", "modern") if (transport, era) != ("sse", "modern")]  # fmt: skip
    for transport in TRANSPORTS:
        jobs.append((f"inspector compute_size {transport}", sizing, (transport,)))
        jobs.append((f"inspector generate_image {transport}", making, (transport,)))
        jobs.append((f"inspector unknown argument {transport}", refusing, (transport,)))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for (name, _, _), (problem, remark) in zip(jobs, pool.map(lambda job: job[1](*job[2]), jobs), strict=True):
            score.tell(name, problem, remark)


def _node(stage: Stage, modules: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = stage.client_env(PATH=f"{modules / '.bin'}:{PATH}")
    command = [str(modules / ".bin" / "node"), str(modules / script), *arguments]
    return subprocess.run(
        command, env=env, cwd=stage.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WITHIN_S
    )


def _answer(told: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    answer = json.loads(told.stdout)
    return answer.get("result", answer)


def _said(told: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {told.returncode}: {(told.stdout + told.stderr).strip()[-600:]}"


def main(python: str, work: str) -> int:
    folder = Path(work).resolve()
    npm_install("npm", HERE, folder / "node")
    modules = folder / "node" / "node_modules"
    for package in ("@modelcontextprotocol/conformance", "@modelcontextprotocol/inspector", "node"):
        print(f"{package} {json.loads((modules / package / 'package.json').read_text())['version']}", flush=True)
    score = Score()
    with Stage(python, folder) as stage:
        conformance(stage, modules, score)
        inspector(stage, modules, score)
    return score.close()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
