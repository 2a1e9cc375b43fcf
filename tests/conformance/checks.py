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
        process = _node(stage, modules, "@modelcontextprotocol/conformance/dist/index.js", "server", "--url", stage.url("http"),
                        "--suite", "all", "--spec-version", version, "-o", str(results))  # fmt: skip
        results_of = {_scenario(folder): _checks(folder) for folder in results.glob("server-*")}
        if not results_of:
            score.record(f"conformance {version}", (process.stdout + process.stderr)[-400:] or "no results")
        for name in sorted(results_of.keys() | set(must_pass)):
            problem, remark = "not in scenarios.toml: does it apply to this server?", ""
            if name in must_pass:
                problem, remark = _failures(results_of.get(name), scenarios["excused"]), _count(results_of.get(name))
            elif name in scenarios["not_ours"]:
                continue
            score.record(f"conformance {version} {name}", problem, remark)
        # Also in scenarios that do not apply, each answer must fit the schema.
        excluded = {name: checks for name, checks in results_of.items() if name not in must_pass}
        invalid = [name for name, checks in excluded.items() if _status(checks, "wire-schema-valid") == "FAILURE"]
        score.record(f"conformance {version} every answer fits the schema", ", ".join(invalid),
                     f"also in {len(excluded)} excluded scenarios, with reasons in scenarios.toml")  # fmt: skip


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
    failures = [check for check in checks if check["status"] == "FAILURE" and check["id"] not in excused]
    return "; ".join(f"{check['id']}: {check.get('errorMessage', '')}" for check in failures)


def _count(checks: list[dict[str, Any]] | None) -> str:
    count = sum(check["status"] == "SUCCESS" for check in checks or ())
    return f"{count} checks" if count else "nothing to check: the server keeps no sessions"


def inspector(stage: Stage, modules: Path, score: Score) -> None:
    """List the tools strictly in both eras, call them, and send a wrong argument, over each transport."""

    def inspect(*arguments: str, transport: str, method: str, era: str = "auto") -> subprocess.CompletedProcess[str]:
        address = [stage.url(transport)] if transport != "stdio" else []
        environment = [part for name, value in stage.server_env.items() for part in ("-e", f"{name}={value}")]
        server = [*environment, "--", *stage.command] if transport == "stdio" else []
        return _node(stage, modules, "@modelcontextprotocol/inspector/clients/launcher/build/index.js", "--cli", *address,
                     "--method", method, "--protocol-era", era, "--format", "json", *arguments, *server)  # fmt: skip

    def call(transport: str, tool: str, arguments: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        options = ("--tool-name", tool, "--tool-args-json", json.dumps(arguments))
        return inspect(*options, transport=transport, method="tools/call")

    def check_list(transport: str, era: str) -> tuple[str, str]:
        process = inspect("--strict", transport=transport, method="tools/list", era=era)
        if process.returncode:
            return _output(process), ""
        tools = _answer(process)["tools"]
        missing = TOOLS - {tool["name"] for tool in tools}
        return f"lacks {sorted(missing)}" if missing else "", f"{len(tools)} tools"

    def check_size(transport: str) -> tuple[str, str]:
        process = call(transport, "compute_size", {"size": "16:9", "resolution": "2K"})
        if process.returncode:
            return _output(process), ""
        facts = _answer(process)["structuredContent"]
        is_correct = (facts["width"], facts["height"]) == (2048, 1152)
        return ("" if is_correct else f"answered {facts}"), facts["explicit_size"]

    def check_image(transport: str) -> tuple[str, str]:
        process = call(transport, "generate_image", {"prompt": f"A harbour for the inspector over {transport}"})
        if process.returncode:
            return _output(process), ""
        path = Path(_answer(process)["structuredContent"]["images"][0]["path"])
        return ("" if path.is_file() and path.is_relative_to(stage.pictures) else f"no picture at {path}"), path.name

    def check_refusal(transport: str) -> tuple[str, str]:
        process = call(transport, "compute_size", {"siez": "16:9"})
        is_correct = process.returncode == TOOL_ERROR and "did you mean size" in process.stdout + process.stderr
        return ("" if is_correct else _output(process)), f"exit code {process.returncode}"

    jobs = [(f"inspector tools/list --strict {era} {transport}", check_list, (transport, era))
            for transport in TRANSPORTS for era in ("legacy", "modern") if (transport, era) != ("sse", "modern")]  # fmt: skip
    for transport in TRANSPORTS:
        jobs.append((f"inspector compute_size {transport}", check_size, (transport,)))
        jobs.append((f"inspector generate_image {transport}", check_image, (transport,)))
        jobs.append((f"inspector unknown argument {transport}", check_refusal, (transport,)))
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        for (name, _, _), (problem, remark) in zip(jobs, pool.map(lambda job: job[1](*job[2]), jobs), strict=True):
            score.record(name, problem, remark)


def _node(stage: Stage, modules: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = stage.client_env(PATH=f"{modules / '.bin'}:{PATH}")
    command = [str(modules / ".bin" / "node"), str(modules / script), *arguments]
    return subprocess.run(
        command, env=env, cwd=stage.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WITHIN_S
    )


def _answer(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    answer = json.loads(process.stdout)
    return answer.get("result", answer)


def _output(process: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {process.returncode}: {(process.stdout + process.stderr).strip()[-600:]}"


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
