"""Test this server with other MCP clients, each installed in its own folder.

    drive.py PYTHON WORK [NAME...]     NAME: only clients whose name contains it

The client scripts only call the tools and print a report (python/, typescript/, hosts.py). This module checks the reports.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hosts
import installed
from fake_model import BASE64_MIN_CHARS, CHARS_PER_TOKEN, FakeModel, fake_model, text_of_result
from stage import PATH, TOOLS, TRANSPORTS, Score, Stage, npm_install

import plugins

FOLDER = Path(__file__).resolve().parent
CONCURRENCY = 3
INSTALL_WITHIN_S, CALLS_WITHIN_S = 300, 300
SIZE = ("compute_size", {"size": "16:9", "resolution": "2K"})
PICTURE_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Client:
    """A client: its name, packages and script, and its protocol modes and transports."""

    name: str
    packages: tuple[str, ...]
    script: str
    modes: tuple[str, ...] = ("",)
    transports: tuple[str, ...] = TRANSPORTS
    impossible: tuple[tuple[str, str], ...] = ()  # pairs of mode and transport that do not exist
    cancels: bool = False  # its script also cancels a call after three seconds


PYTHON_CLIENTS = (
    Client("pydantic-ai", ("pydantic-ai-slim[mcp]==2.68.0",), "pydantic_ai_toolset.py"),
    Client("langchain", ("langchain-mcp-adapters==0.3.2",), "langchain_adapters.py"),
    Client("openai-agents", ("openai-agents==0.24.0",), "openai_agents.py"),
    Client("fastmcp 4", ("fastmcp-slim[client]==4.2.1",), "fastmcp_client.py"),
    Client("fastmcp 2", ("fastmcp==2.14.7",), "fastmcp_client.py"),
    Client("fastmcp tasks", ("fastmcp-tasks==4.1.2",), "fastmcp_tasks_client.py", transports=("stdio", "http")),
    Client("mcp-use", ("mcp-use==1.7.1", "mcp<2"), "mcp_use_session.py"),
    Client("smolagents", ("smolagents[mcp]==1.26.0", "mcp<2"), "smolagents_tools.py"),
    Client("mcp 2.3", ("mcp==2.3.0",), "mcp2.py", ("auto", "legacy"), impossible=(("auto", "sse"),), cancels=True),
    Client("mcp 1.30", ("mcp==1.30.0",), "mcp1.py"),
    Client("mcp 1.26", ("mcp==1.26.0",), "mcp1.py", transports=("stdio",)),
    Client("mcp 1.20", ("mcp==1.20.0", "pydantic<2.12"), "mcp1.py", transports=("stdio",)),
    Client("mcp 1.13", ("mcp==1.13.1", "pydantic<2.12"), "mcp1.py", transports=("stdio",)),
    Client("mcp 1.9", ("mcp==1.9.4", "pydantic<2.11"), "mcp1.py"),
    Client("mcp 1.6", ("mcp==1.6.0", "pydantic<2.11", "starlette<0.47"), "mcp1.py", transports=("stdio",)),
    Client("mcp 1.2", ("mcp==1.2.0", "pydantic<2.11", "starlette<0.47"), "mcp1.py", transports=("stdio",)),
)
NODE_CLIENTS = (
    Client("typescript sdk 1", (), "sdk1.mjs", cancels=True),
    Client("typescript client 2", (), "client2.mjs", ("legacy", "auto"), impossible=(("auto", "sse"),), cancels=True),
)


@dataclass(frozen=True)
class Framework:
    """A framework for agents: its name, packages and script, and the model APIs that it can use.

    Its agent calls generate_image because a simulated model orders it. The framework converts all schemas for the model.
    """

    name: str
    packages: tuple[str, ...]
    script: str
    modes: tuple[str, ...] = ("chat",)


PYTHON_FRAMEWORKS = (
    Framework("google-genai", ("google-genai==3.6.1", "mcp<2"), "google_genai.py", ("gemini",)),
    Framework("Google ADK", ("google-adk==2.13.0", "mcp"), "google_adk_agent.py", ("gemini",)),
    Framework("openai-agents agent", ("openai-agents==0.24.0",), "openai_agents_run.py", ("chat", "responses")),
    Framework("LangChain", ("langchain", "langchain-mcp-adapters==0.3.2", "langchain-openai"), "langchain_agent.py"),
    Framework("LlamaIndex", ("llama-index-tools-mcp==0.6.0", "llama-index-llms-openai-like"), "llama_index_agent.py"),
    Framework("pydantic-ai agent", ("pydantic-ai-slim[mcp,openai]==2.68.0",), "pydantic_ai_agent.py"),
    Framework("Haystack", ("mcp-haystack==2.1.1",), "haystack_agent.py"),
    Framework("Agno", ("agno==3.1.10", "fastmcp>=4,<5", "openai"), "agno_agent.py"),
    Framework("AutoGen", ("autogen-ext[mcp,openai]==0.7.5", "autogen-agentchat==0.7.5", "mcp<2"), "autogen_agent.py"),
    Framework("Strands", ("strands-agents[openai]==1.62.0",), "strands_agent.py"),
    Framework(
        "Agent Framework",
        ("agent-framework-core==1.23.0", "agent-framework-openai", "mcp", "tenacity"),
        "agent_framework_agent.py",
    ),
    Framework("Semantic Kernel", ("semantic-kernel[mcp]==1.45.0",), "semantic_kernel_agent.py"),
    Framework("mcp-use agent", ("mcp-use==1.7.1", "mcp<2", "langchain-openai"), "mcp_use_agent.py"),
)
NODE_FRAMEWORKS = (
    Framework("Vercel AI SDK", (), "vercel_ai.mjs", ("chat", "responses", "gemini")),
    Framework("openai-agents js", (), "openai_agents.mjs"),
)


class Drive:
    """Run all clients against one stage."""

    def __init__(self, stage: Stage, names: list[str], uv: str, npm: str) -> None:
        self.stage, self.names, self.uv, self.npm = stage, names, uv, npm
        self.score = Score()
        self.prompts: list[str] = []
        self.table: list[tuple[str, str, str, str, str]] = []
        self._lock = threading.Lock()

    def run_all(self) -> int:
        """Run the tests of all clients, CONCURRENCY at a time. Return the exit code."""
        client_tests = [
            self._test_hosts,
            self._test_bridges,
            self._test_typescript,
            self._test_node_frameworks,
            *(self._python_test(client) for client in PYTHON_CLIENTS),
            *(self._framework_test(framework) for framework in PYTHON_FRAMEWORKS),
        ]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            for future in [pool.submit(self._run_test, client_test) for client_test in client_tests]:
                future.result()
        self._check_purchases()
        return self.score.close()

    def _run_test(self, client_test: Any) -> None:
        try:
            client_test()
        except Exception as error:  # noqa: BLE001 - an error of one client is one failed line
            traceback.print_exc()
            name = getattr(client_test, "__name__", "a client").removeprefix("_test_")
            self._record(name, "", "", f"{type(error).__name__}: {error}")

    def _is_selected(self, name: str) -> bool:
        return not self.names or any(word in name for word in self.names)

    # --- the tests of one client or of one group of clients ---

    def _python_test(self, client: Client):
        def client_test() -> None:
            if not self._is_selected(client.name):
                return
            folder = self.stage.work / client.name.replace(" ", "-")
            python = str(folder / "bin" / "python")
            self._install([self.uv, "venv", "-q", "--python", self.stage.command[0], str(folder)])
            self._install([self.uv, "pip", "install", "-q", "--python", python, *client.packages])
            self._test_client(client, [python, str(FOLDER / "python" / client.script)])

        client_test.__name__ = client.name
        return client_test

    def _framework_test(self, framework: Framework):
        def client_test() -> None:
            if self._is_selected(framework.name):
                folder = self.stage.work / framework.script.removesuffix(".py")
                python = str(folder / "bin" / "python")
                self._install([self.uv, "venv", "-q", "--python", self.stage.command[0], str(folder)])
                self._install([self.uv, "pip", "install", "-q", "--python", python, *framework.packages])
                self._test_agents(framework, [python, str(FOLDER / "frameworks" / framework.script)])

        client_test.__name__ = framework.name
        return client_test

    def _test_node_frameworks(self) -> None:
        frameworks = [framework for framework in NODE_FRAMEWORKS if self._is_selected(framework.name)]
        if frameworks:
            folder = self.stage.work / "frameworks_node"
            npm_install(self.npm, FOLDER / "frameworks_node", folder)
            for framework in frameworks:
                self._test_agents(
                    framework, [str(folder / "node_modules" / ".bin" / "node"), str(folder / framework.script)]
                )

    def _test_agents(self, framework: Framework, command: list[str]) -> None:
        """Let the framework's agent order one image with each API of the simulated model."""
        for mode in framework.modes:
            with fake_model(self._prompt(framework.name, mode)) as (model, url):
                target = {**self.stage.target("stdio"), "mode": mode, "model_url": url}
                report = self._run_script(framework.name, command, target, mode)
            if report is not None:
                text = "\n".join(map(text_of_result, model.results))
                remark = f"the model reads {len(text) // CHARS_PER_TOKEN} tokens"
                self._record(
                    framework.name, report["version"], mode, "; ".join(self._agent_faults(model, text)), remark
                )

    def _agent_faults(self, model: FakeModel, text: str) -> Iterable[str]:
        """Yield each fault of a framework's run: of its converted tools, and of the text that the model reads."""
        missing = [name for name in TOOLS if not any(tool.endswith(name) for tool in model.tools)]
        if missing:
            yield f"does not offer {missing} to the model"
        if len(model.results) != 1:
            yield f"the model got {len(model.results)} results"
        path = re.search(re.escape(str(self.stage.pictures)) + r"/[\w.-]+\.png", text)
        if path is None or not self._is_picture(Path(path[0])):
            yield f"the text does not name the picture: {text[:300]!r}"
        if re.search(rf"[A-Za-z0-9+/=]{{{BASE64_MIN_CHARS},}}", text):
            yield f"the model reads a preview as {len(text) // CHARS_PER_TOKEN} tokens of text"

    def _test_typescript(self) -> None:
        clients = [client for client in NODE_CLIENTS if self._is_selected(client.name)]
        if clients:
            folder = self.stage.work / "typescript"
            npm_install(self.npm, FOLDER / "typescript", folder)
            for client in clients:
                self._test_client(client, [str(folder / "node_modules" / ".bin" / "node"), str(folder / client.script)])

    def _test_bridges(self) -> None:
        """Test the bridges from stdio to HTTP or SSE. The official client calls the server through them."""
        names = [name for name in ("mcp-remote", "supergateway", "mcp-proxy", "mcporter") if self._is_selected(name)]
        if not names:
            return
        folder = self.stage.work / "bridges"
        npm_install(self.npm, FOLDER / "bridges", folder)
        bins = folder / "node_modules" / ".bin"
        python = str(folder / "python" / "bin" / "python")
        self._install([self.uv, "venv", "-q", "--python", self.stage.command[0], str(folder / "python")])
        self._install([self.uv, "pip", "install", "-q", "--python", python, "mcp-proxy==0.13.0"])
        env = self.stage.client_env(PATH=f"{bins}:{PATH}", MCP_REMOTE_CONFIG_DIR=str(folder / "mcp-remote"))
        for transport in ("http", "sse"):
            url = self.stage.url(transport)
            bridges = {
                "mcp-remote": [str(bins / "mcp-remote"), url, "--allow-http", "--transport", f"{transport}-only"],
                "supergateway": [
                    str(bins / "supergateway"), "--streamableHttp" if transport == "http" else "--sse", url,
                    "--logLevel", "none",
                ],
                "mcp-proxy": [
                    str(folder / "python" / "bin" / "mcp-proxy"), "--transport",
                    "streamablehttp" if transport == "http" else "sse", url,
                ],
            }  # fmt: skip
            for name in names:
                if name in bridges:
                    self._test_bridge(name, bridges[name], env, transport)
        if "mcporter" in names:
            self._test_mcporter(folder, bins, env)

    def _test_bridge(self, name: str, bridge: list[str], env: dict[str, str], transport: str) -> None:
        target = {
            "transport": "stdio", "command": bridge[0], "args": bridge[1:], "env": env, "mode": "legacy",
            "prompt": self._prompt(name, transport),
        }  # fmt: skip
        forwards_cancellation = name == "mcp-remote"
        if forwards_cancellation:
            target["slow"] = self._prompt(name, transport, "sim:slow=5 ")
        report = self._run_script(name, [self.stage.command[0], str(FOLDER / "python" / "mcp2.py")], target, transport)
        if report is None:
            return
        if not forwards_cancellation:  # the others do not forward the cancellation, so the result counts as delivered
            report.pop("again")
        if name == "supergateway":  # it does not forward progress
            report["image"]["progress"] = None
        self._record(name, "", transport, "; ".join(self._faults(report)), _remark(report))

    def _test_mcporter(self, folder: Path, bins: Path, env: dict[str, str]) -> None:
        """Test the command line of mcporter: list the tools and call one."""
        config = folder / "mcporter.json"
        config.write_text(json.dumps({"mcpServers": {"evolink": {"url": self.stage.url("http"), "allowHttp": True}}}))
        command = [str(bins / "mcporter"), "--config", str(config)]
        processes = [
            subprocess.run(
                [*command, *arguments], env=env, cwd=self.stage.home, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=CALLS_WITHIN_S,
            )
            for arguments in (["list", "evolink"], ["call", "evolink.compute_size", "size=16:9", "resolution=2K"])
        ]  # fmt: skip
        output = "".join(process.stdout + process.stderr for process in processes)
        missing = [word for word in ("generate_image", "2048") if word not in output]
        self._record("mcporter", "", "http", f"no {missing} in {output[-600:]!r}" if missing else "")

    def _test_hosts(self) -> None:
        names = [
            name for name in ("claude code", "gemini cli", "codex", "install", "plugins") if self._is_selected(name)
        ]
        if not names:
            return
        folder = self.stage.work / "hosts"
        npm_install(self.npm, FOLDER / "hosts", folder)
        modules = folder / "node_modules"
        for name, package, list_servers in (
            ("claude code", "@anthropic-ai/claude-code", hosts.claude_code),
            ("gemini cli", "@google/gemini-cli", hosts.gemini_cli),
        ):
            if name in names:
                for transport, problem in list_servers(self.stage, modules):
                    self._record(name, hosts.version_of(modules, package), transport, problem, "mcp list: connected")
        if "install" in names:
            for name, version, problem in installed.install_faults(self.stage, modules):
                self._record(f"install {name}", version, "stdio", problem, "mcp list after install, then undo")
        if "plugins" in names:
            for name, version, problem in plugins.plugin_faults(self.stage, modules):
                self._record(f"plugins: {name}", version, "stdio", problem)
        if "codex" in names:
            with hosts.codex(self.stage, modules) as call:
                for transport in ("stdio", "http"):
                    prompt = self._prompt("codex", transport)
                    report = {
                        "tools": list(call(transport, "tools/list", {})["tools"]),
                        "size": _report_of(call(transport, *SIZE)),
                        "image": _report_of(call(transport, "generate_image", {"prompt": prompt, "n": 1})),
                        "bad": _report_of(
                            call(transport, "generate_image", {"prompt": prompt, "promt": "a typing error"})
                        ),
                    }
                    self._record(
                        "codex", hosts.version_of(modules, "@openai/codex"), transport,
                        "; ".join(self._faults(report)), _remark(report),
                    )  # fmt: skip

    # --- the calls of one client ---

    def _test_client(self, client: Client, command: list[str]) -> None:
        for mode in client.modes:
            for transport in client.transports:
                if (mode, transport) not in client.impossible:
                    self._test_transport(client, command, mode, transport)

    def _test_transport(self, client: Client, command: list[str], mode: str, transport: str) -> None:
        name = f"{client.name} {mode}".strip()
        target = {**self.stage.target(transport), "mode": mode, "prompt": self._prompt(name, transport)}
        if client.cancels:
            target["slow"] = self._prompt(name, transport, "sim:slow=5 ")
        report = self._run_script(name, command, target, transport)
        if report is not None:
            self._record(name, report["version"], transport, "; ".join(self._faults(report)), _remark(report))

    def _run_script(
        self, name: str, command: list[str], target: dict[str, Any], transport: str
    ) -> dict[str, Any] | None:
        """Run a client's script and return its report. None if it printed no report, which is a failed check."""
        try:
            process = subprocess.run(
                [*command, json.dumps(target)], env=self.stage.client_env(), cwd=self.stage.home,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALLS_WITHIN_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            self._record(name, "", transport, f"no end within {CALLS_WITHIN_S} s")
            return None
        report = next((line[7:] for line in process.stdout.splitlines() if line.startswith("REPORT ")), None)
        if report is None:
            sys.stderr.write(process.stdout[-2000:] + process.stderr[-4000:])
            self._record(name, "", transport, f"exit code {process.returncode} and no report")
            return None
        return json.loads(report)

    def _faults(self, report: dict[str, Any]) -> Iterable[str]:
        """Yield each fault in a client's report."""
        if not set(report["tools"]) >= TOOLS:
            yield f"lists only {report['tools']}"
        size, image, bad = report["size"], report["image"], report["bad"]
        if size["error"] or not _contains(size, "2048", "1152"):
            yield f"compute_size answered {size}"
        path = _path(image)
        if image["error"] or path is None:
            yield f"generate_image answered {image}"
        elif not self._is_picture(Path(path)):
            yield f"{path} is no picture"
        elif image["text"] and path not in image["text"]:
            yield "the text does not name the picture"
        progress = image.get("progress")
        # The TypeScript SDK drops the last progress notification if it arrives in the same packet as the answer.
        last = 99 if str(report.get("version", "")).startswith("@modelcontextprotocol/") else 100
        if progress is not None and (not progress or progress != sorted(set(progress)) or progress[-1] < last):
            yield f"progress went {progress}"
        again = report.get("again")
        if again is not None and not (again["gaveUp"] and _contains(again, "earlier identical call", "completed")):
            yield f"the same call after the cancelled one was answered {again}"
        if bad["error"] is False or not _contains(bad, "promt: unknown argument; did you mean prompt?"):
            yield f"the bad call was answered {bad}"

    def _is_picture(self, path: Path) -> bool:
        return path.is_relative_to(self.stage.pictures) and path.read_bytes().startswith(PICTURE_MAGIC)

    def _check_purchases(self) -> None:
        """Check that the journal has each ordered image once. Wrong calls and probes buy nothing."""
        journal_prompts = sorted(entry["request"]["prompt"] for entry in self.stage.journal_entries())
        is_exact = journal_prompts == sorted(self.prompts)
        problem = "" if is_exact else f"asked for {sorted(self.prompts)}, bought {journal_prompts}"
        self.score.record("one journal for all: each picture bought once", problem, f"{len(journal_prompts)} pictures")

    def _prompt(self, name: str, transport: str, order: str = "") -> str:
        prompt = f"{order}A lighthouse for {name} over {transport}"
        with self._lock:
            self.prompts.append(prompt)
        return prompt

    def _record(self, name: str, version: str, transport: str, problem: str, remark: str = "") -> None:
        with self._lock:
            self.table.append((name, version, transport, problem, remark))
            self.score.record(f"{name} [{version}] {transport}".replace(" []", "").strip(), problem, remark)

    def _install(self, command: list[str]) -> None:
        process = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_WITHIN_S)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{process.stdout}{process.stderr}")


def _contains(answer: dict[str, Any], *words: str) -> bool:
    text = f"{answer['text']}\n{json.dumps(answer['structured'], ensure_ascii=False)}"
    return all(word in text for word in words)


def _path(image: dict[str, Any]) -> str | None:
    """Return the image's path from the structured content, or else from the text."""
    if image["structured"]:
        return next((picture["path"] for picture in image["structured"]["images"]), None)
    return next((line for line in image["text"].splitlines() if line.startswith("/") and line.endswith(".png")), None)


def _report_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return a protocol result in the form of the reports."""
    text = "\n".join(block["text"] for block in result["content"] if block["type"] == "text")
    return {"text": text, "structured": result.get("structuredContent"), "error": bool(result.get("isError"))}


def _remark(report: dict[str, Any]) -> str:
    parts = [report.get("protocol", ""), "progress" if report["image"].get("progress") else ""]
    return ", ".join(part for part in parts if part)


def main(python: str, work: str, *names: str) -> int:
    folder = Path(work).resolve()
    with Stage(python, folder) as stage:
        drive = Drive(stage, list(names), uv=str(folder / "uv" / "bin" / "uv"), npm="npm")
        code = drive.run_all()
        (folder / "results.json").write_text(json.dumps(drive.table, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
