"""The official conformance suite and the MCP Inspector against this server: checks.py PYTHON WORK."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "clients"))
from stage import PATH, TOOLS, TRANSPORTS, Score, Stage, npm_install  # noqa: E402

CONCURRENCY = 2
WITHIN_S = 300
TOOL_ERROR = 5  # the Inspector's exit code if a tool's answer is an error


def conformance(stage: Stage, modules: Path, score: Score) -> None:
    """Run each server scenario at each protocol version and compare it with scenarios.toml."""
    scenarios = tomllib.loads((FOLDER / "scenarios.toml").read_text())
    for version, must_pass in scenarios["must_pass"].items():
        results = stage.work / f"conformance-{version}"
        run = _node(stage, modules, "@modelcontextprotocol/conformance/dist/index.js", "server", "--url", stage.url("http"),
                     "--suite", "all", "--spec-version", version, "-o", str(results))  # fmt: skip
        results_of = {_scenario(folder): _checks(folder) for folder in results.glob("server-*")}
        if not results_of:
            score.tell(f"conformance {version}", (run.stdout + run.stderr)[-400:] or "no results")
        for name in sorted(results_of.keys() | set(must_pass)):
            problem, remark = "not in scenarios.toml: does it apply to this server?", ""
            if name in must_pass:
                problem, remark = _failures(results_of.get(name), scenarios["excused"]), _count(results_of.get(name))
            elif name in scenarios["not_ours"]:
                continue
            score.tell(f"conformance {version} {name}", problem, remark)
        # Also in scenarios that do not apply, each answer must fit the schema.
        aside = {name: checks for name, checks in results_of.items() if name not in must_pass}
        broken = [name for name, checks in aside.items() if _status(checks, "wire-schema-valid") == "FAILURE"]
        score.tell(f"conformance {version} every answer fits the schema", ", ".join(broken),
                   f"also in {len(aside)} scenarios set aside, with reasons in scenarios.toml")  # fmt: skip


def _scenario(folder: Path) -> str:
    """Return NAME of the results folder `server-NAME-2026-11-22T22-29-15-627Z`."""
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
    """List the tools strictly in both eras, call them, and send a wrong argument, over each transport."""

    def inspect(*arguments: str, transport: str, method: str, era: str = "auto") -> subprocess.CompletedProcess[str]:
        where = [stage.url(transport)] if transport != "stdio" else []
        environment = [part for name, value in stage.server_env.items() for part in ("-e", f"{name}={value}")]
        server = [*environment, "--", *stage.command] if transport == "stdio" else []
        return _node(stage, modules, "@modelcontextprotocol/inspector/clients/launcher/build/index.js", "--cli", *where,
                     "--method", method, "--protocol-era", era, "--format", "json", *arguments, *server)  # fmt: skip

    def call(transport: str, tool: str, arguments: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        options = ("--tool-name", tool, "--tool-args-json", json.dumps(arguments))
        return inspect(*options, transport=transport, method="tools/call")

    def listing(transport: str, era: str) -> tuple[str, str]:
        run = inspect("--strict", transport=transport, method="tools/list", era=era)
        if run.returncode:
            return _output(run), ""
        tools = _answer(run)["tools"]
        lacking = TOOLS - {tool["name"] for tool in tools}
        return f"lacks {sorted(lacking)}" if lacking else "", f"{len(tools)} tools"

    def sizing(transport: str) -> tuple[str, str]:
        run = call(transport, "compute_size", {"size": "16:9", "resolution": "2K"})
        if run.returncode:
            return _output(run), ""
        facts = _answer(run)["structuredContent"]
        good = (facts["width"], facts["height"]) == (2048, 1152)
        return ("" if good else f"answered {facts}"), facts["explicit_size"]

    def making(transport: str) -> tuple[str, str]:
        run = call(transport, "generate_image", {"prompt": f"A harbour for the inspector over {transport}"})
        if run.returncode:
            return _output(run), ""
        path = Path(_answer(run)["structuredContent"]["images"][0]["path"])
        return ("" if path.is_file() and path.is_relative_to(stage.pictures) else f"no picture at {path}"), path.name

    def refusing(transport: str) -> tuple[str, str]:
        run = call(transport, "compute_size", {"siez": "16:9"})
        good = run.returncode == TOOL_ERROR and "did you mean size" in run.stdout + run.stderr
        return ("" if good else _output(run)), f"exit code {run.returncode}"

    jobs = [(f"inspector tools/list --strict {era} {transport}", listing, (transport, era))
            for transport in TRANSPORTS for era in ("legacy", "modern") if (transport, era) != ("sse", "modern")]  # fmt: skip
    for transport in TRANSPORTS:
        jobs.append((f"inspector compute_size {transport}", sizing, (transport,)))
        jobs.append((f"inspector generate_image {transport}", making, (transport,)))
        jobs.append((f"inspector unknown argument {transport}", refusing, (transport,)))
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        for (name, _, _), (problem, remark) in zip(jobs, pool.map(lambda job: job[1](*job[2]), jobs), strict=True):
            score.tell(name, problem, remark)


def _node(stage: Stage, modules: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = stage.client_env(PATH=f"{modules / '.bin'}:{PATH}")
    command = [str(modules / ".bin" / "node"), str(modules / script), *arguments]
    return subprocess.run(
        command, env=env, cwd=stage.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WITHIN_S
    )


def _answer(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    answer = json.loads(run.stdout)
    return answer.get("result", answer)


def _output(run: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {run.returncode}: {(run.stdout + run.stderr).strip()[-600:]}"


def main(python: str, work: str) -> int:
    folder = Path(work).resolve()
    npm_install("npm", FOLDER, folder / "node")
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
