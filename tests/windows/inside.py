"""Test the command with a real MCP client under a Windows Python: stdio, HTTP, paths and shutdown.

    python inside.py FOLDER          writes only below FOLDER

It prints one line per check, then "N passed, N failed". A check that this Windows cannot run is printed as "lacking".
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from PIL import Image

TOOLS = {tool["name"] for tool in json.loads((Path(__file__).parents[2] / "manifest.json").read_text("utf-8"))["tools"]}
SERVER = [sys.executable, "-P", "-m", "evolink_mcp"]
REQUEST = {"prompt": "A fox", "size": "1024x640", "quality": "low"}
START_TIMEOUT_S = 200.0
END_TIMEOUT_S = 10.0
CHECKS: list[Callable[[Stage], Awaitable[str | None]]] = []


class Lacking(Exception):
    """This Windows (Wine) lacks a function that the check needs."""


class Stage:
    """A simulated EvoLink, and the environment of every server of a check."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.images = folder / "pictures"
        self.allowed_folder = folder / "Büro desk"
        self.allowed_folder.mkdir(parents=True)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.evolink = self.serve("simulate", "--seconds", "1")
        self.env = {
            **os.environ, "EVOLINK_API_KEY": "sk-simulated", "EVOLINK_BASE_URL": f"http://127.0.0.1:{self.evolink}",
            "EVOLINK_MCP_DATA_DIR": str(self.data), "EVOLINK_MCP_OUTPUT_DIR": str(self.images),
            "EVOLINK_MCP_ALLOWED_DIRS": str(self.allowed_folder),
        }  # fmt: skip
        wait_until_ready(self.evolink, "/v1/models")

    def serve(self, *command: str, **env: str) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = (*SERVER, *command, "--port", str(port))
        env = {**getattr(self, "env", os.environ), **env}
        self._processes.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        return port

    def stdio(self, **env: str) -> Client:
        return Client(StdioServerParameters(command=SERVER[0], args=SERVER[1:], env={**self.env, **env}))

    def run(self, *arguments: str, **env: str) -> str:
        process = subprocess.run([*SERVER, *arguments], env={**self.env, **env}, capture_output=True, timeout=300)
        if process.returncode:
            raise AssertionError(f"exit code {process.returncode}: {process.stderr!r}")
        return process.stdout.decode(env.get("PYTHONIOENCODING", "utf-8"), "replace")

    def process(self, **env: str) -> subprocess.Popen[bytes]:
        """Start a stdio server and return it after its answer to `initialize`."""
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        server = subprocess.Popen(
            SERVER, env={**self.env, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            creationflags=flags,
        )  # fmt: skip
        self._processes.append(server)
        send(
            server,
            0,
            "initialize",
            protocolVersion="2025-11-25",
            capabilities={},
            clientInfo={"name": "x", "version": "1"},
        )
        assert receive(server, 0)["result"]["serverInfo"]
        return server

    def close(self) -> None:
        for process in self._processes:
            with suppress(OSError):
                process.kill()


def send(server: subprocess.Popen[bytes], number: int, method: str, **params: Any) -> None:
    assert server.stdin is not None
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    server.stdin.write(json.dumps(message).encode() + b"\n")
    server.stdin.flush()


def receive(server: subprocess.Popen[bytes], number: int) -> dict[str, Any]:
    assert server.stdout is not None
    while line := server.stdout.readline():
        if (message := json.loads(line)).get("id") == number:
            return message
    raise AssertionError("the server has ended")


def wait_until_ready(port: int, path: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": "Bearer sk-simulated"})
    while time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"no server answers on port {port}")


def assert_exit(server: subprocess.Popen[bytes], code: int) -> None:
    started_at = time.monotonic()
    try:
        exit_code = server.wait(END_TIMEOUT_S + 10)
    except subprocess.TimeoutExpired:
        raise AssertionError("the server does not end") from None
    assert exit_code == code, f"exit code {exit_code}, not {code}: {server.stderr.read()[-500:]!r}"
    duration_s = time.monotonic() - started_at
    assert duration_s <= END_TIMEOUT_S, f"the server ended after {duration_s:.1f} s"
    assert b"Traceback" not in server.stderr.read()


def check(function: Callable[[Stage], Awaitable[str | None]]) -> Callable[[Stage], Awaitable[str | None]]:
    CHECKS.append(function)
    return function


async def call_tool_ok(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    answer = await client.call_tool(tool, arguments)
    assert answer.structured_content is not None, answer
    assert not answer.is_error, answer.content[0]
    return answer.structured_content


def assert_image(path: str, size: tuple[int, int] = (1024, 640)) -> None:
    with Image.open(path) as image:
        image.load()
        assert image.size == size, image.size


@check
async def every_tool_answers_over_stdio(stage: Stage) -> None:
    async with stage.stdio() as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
        size_answer = await call_tool_ok(client, "compute_size", size="16:9", resolution="2K")
        assert size_answer["width"] == 2048
        purchase = await call_tool_ok(client, "generate_image", **REQUEST)
        (image,) = purchase["images"]
        assert Path(image["path"]).parent == stage.images.resolve(), image["path"]
        assert_image(image["path"])
        task = await call_tool_ok(client, "get_task", task_id=purchase["task_id"])
        assert task["images"][0]["path"] == image["path"]
        view = await client.call_tool("view_image", {"task_id": purchase["task_id"]})
        assert any(block.type == "image" for block in view.content)
        assert (await call_tool_ok(client, "list_tasks"))["tasks"][0]["task_id"] == purchase["task_id"]
        assert "account_remaining" in json.dumps(await call_tool_ok(client, "get_balance"))
        assert not list(stage.images.glob("*.part"))


@check
async def http_saves_an_image(stage: Stage) -> None:
    port = stage.serve("http")
    wait_until_ready(port, "/healthz")
    async with Client(f"http://127.0.0.1:{port}/mcp") as client:
        purchase = await call_tool_ok(client, "generate_image", **{**REQUEST, "prompt": "A fox over HTTP"})
    assert_image(purchase["images"][0]["path"])


@check
async def references_accept_the_path_forms_of_windows(stage: Stage) -> str:
    picture = stage.allowed_folder / "Füchse & co (1).png"
    Image.new("RGB", (64, 64), "red").save(picture)
    deep_folder = stage.allowed_folder / "x".join(["long folder"] * 9) / "y".join(["deeper folder"] * 9)
    sources = {
        "backslashes": str(picture), "forward slashes": picture.as_posix(), "a file URI": picture.as_uri(),
        "only the name": picture.name, "another case": str(picture).upper(),
    }  # fmt: skip
    lacking = []
    try:
        deep_folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), "blue").save(deep_folder / "long.png")
        (deep_folder / "long.png").resolve()
        sources[f"{len(str(deep_folder / 'long.png'))} characters"] = str(deep_folder / "long.png")
    except OSError:
        lacking.append("paths above 260 characters")
    async with stage.stdio() as client:
        for name, source in sources.items():
            answer = await client.call_tool(
                "generate_image", {**REQUEST, "prompt": f"by {name}", "image_urls": [source]}
            )
            assert not answer.is_error, (name, answer.content[0].text)
        for name, source in {
            "a network path": r"\\server\share\fox.png", "outside": r"C:\windows\win.ini", "a drive's folder": "C:fox.png",
            "a device": r"\\.\C:", "the long form": "\\\\?\\C:\\windows\\win.ini",
        }.items():  # fmt: skip
            answer = await client.call_tool(
                "generate_image", {**REQUEST, "prompt": f"by {name}", "image_urls": [source]}
            )
            assert answer.is_error, name
            assert answer.structured_content["charged"] == "no", (name, answer.content[0].text)
    return ", ".join(sources) + (f" (lacking: {', '.join(lacking)})" if lacking else "")


@check
async def save_as_refuses_names_that_windows_reserves(stage: Stage) -> None:
    async with stage.stdio() as client:
        for name in (
            "NUL",
            "con.png",
            "COM1",
            "lpt9.webp",
            "hero.",
            "hero .png ",
            "C:hero.png",
            r"\hero.png",
            "a?.png",
        ):
            answer = await client.call_tool("generate_image", {**REQUEST, "prompt": f"save {name}", "save_as": name})
            assert answer.is_error, name
            assert answer.structured_content["charged"] == "no", name
        first = await call_tool_ok(
            client, "generate_image", **{**REQUEST, "prompt": "save", "save_as": "sub folder/Größe.png"}
        )
        assert first["images"][0]["path"].endswith(r"sub folder\Größe.png"), first["images"][0]["path"]
        second = await call_tool_ok(
            client, "generate_image", **{**REQUEST, "prompt": "save 2", "save_as": "SUB FOLDER/größe.png"}
        )
        assert second["images"][0]["path"].lower().endswith("größe-1.png"), second["images"][0]["path"]


@check
async def a_closed_stdin_ends_the_server(stage: Stage) -> None:
    server = stage.process()
    server.stdin.close()
    assert_exit(server, 0)


@check
async def a_closed_stdin_ends_the_server_while_a_call_waits(stage: Stage) -> None:
    server = stage.process()
    send(server, 1, "tools/call", name="generate_image", arguments={**REQUEST, "prompt": "sim:slow=60 waits"})
    time.sleep(2)
    server.stdin.close()
    assert_exit(server, 0)


@check
async def ctrl_break_ends_the_server(stage: Stage) -> None:
    server = stage.process()
    try:
        server.send_signal(signal.CTRL_BREAK_EVENT)
    except (OSError, SystemError) as error:
        server.stdin.close()
        raise Lacking(f"console events ({error.__cause__ or error})") from error
    assert_exit(server, 143)


@check
async def a_server_adopts_the_task_of_a_killed_server(stage: Stage) -> None:
    async with stage.stdio() as survivor:
        victim = stage.process()
        arguments = {**REQUEST, "prompt": "sim:slow=6 of a killed server", "wait_seconds": 1}
        send(victim, 1, "tools/call", name="generate_image", arguments=arguments)
        task_id = receive(victim, 1)["result"]["structuredContent"]["task_id"]
        running_task = await call_tool_ok(survivor, "get_task", task_id=task_id, wait_seconds=1)
        assert running_task["status"] != "completed"
        victim.kill()
        victim.wait()
        answer = await call_tool_ok(survivor, "get_task", task_id=task_id)
        assert answer["status"] == "completed", answer
        assert_image(answer["images"][0]["path"])
        entries = (await call_tool_ok(survivor, "list_tasks", limit=50, detail=True))["tasks"]
        assert [entry["task_id"] for entry in entries].count(task_id) == 1


@check
async def tasks_and_doctor_read_the_journal(stage: Stage) -> None:
    assert "A fox" in stage.run("tasks")
    report = json.loads(stage.run("doctor", "--json"))
    assert {"findings", "hosts"} <= report.keys(), report.keys()


@check
async def the_demo_prints_to_a_console_without_unicode(stage: Stage) -> None:
    for encoding in ("cp1252", "cp437", "utf-8"):
        output = stage.run("demo", "A fox for a console", PYTHONIOENCODING=encoding)
        assert "Done in" in output, output
        assert ("[####" in output) == (encoding == "cp1252"), output


@check
async def a_used_port_ends_the_start_without_a_traceback(stage: Stage) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        process = subprocess.run([*SERVER, "http", "--port", port], env=stage.env, capture_output=True, timeout=300)
    assert process.returncode == 1
    assert b"Traceback" not in process.stderr, process.stderr


def main(folder: str) -> int:
    failed = 0
    passed = 0
    stage = Stage(Path(folder))
    try:
        for function in CHECKS:
            name = function.__name__.replace("_", " ")
            try:
                remark = anyio.run(function, stage) or ""
            except Lacking as error:
                print(f"lacking  {name}: {error}", flush=True)
            except BaseException:  # noqa: BLE001
                failed += 1
                print(f"FAILED   {name}\n{traceback.format_exc()}", flush=True)
            else:
                passed += 1
                print(f"ok       {name}  {remark}", flush=True)
    finally:
        stage.close()
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # pyright: ignore
    os._exit(main(sys.argv[1]))
