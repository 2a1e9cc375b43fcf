"""Runs under a Windows Python: a real MCP client against the real command, over stdio and HTTP, with Windows' paths.

    python inside.py FOLDER          everything that is written lies below FOLDER

Prints one line for each promise, then "N passed, N failed"; what this Windows lacks is named.
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

SERVER = [sys.executable, "-P", "-m", "evolink_mcp"]
WISH = {"prompt": "A fox", "size": "1024x640", "quality": "low"}
UP_WITHIN_S, LEAVES_WITHIN_S = 200.0, 10.0
PROMISES: list[Callable[[Stage], Awaitable[str | None]]] = []


class Lacking(Exception):
    """This Windows (Wine) cannot do what the promise needs."""


class Stage:
    """A simulated EvoLink, and the environment of every server here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.pictures, self.desk = folder / "data", folder / "pictures", folder / "Büro desk"
        self.desk.mkdir(parents=True)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.evolink = self.serve("simulate", "--seconds", "1")
        self.env = {
            **os.environ, "EVOLINK_API_KEY": "sk-simulated", "EVOLINK_BASE_URL": f"http://127.0.0.1:{self.evolink}",
            "EVOLINK_MCP_DATA_DIR": str(self.data), "EVOLINK_MCP_OUTPUT_DIR": str(self.pictures),
            "EVOLINK_MCP_ALLOWED_DIRS": str(self.desk),
        }  # fmt: skip
        up(self.evolink, "/v1/models")

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
        done = subprocess.run([*SERVER, *arguments], env={**self.env, **env}, capture_output=True, timeout=300)
        if done.returncode:
            raise AssertionError(f"exit code {done.returncode}: {done.stderr!r}")
        return done.stdout.decode(env.get("PYTHONIOENCODING", "utf-8"), "replace")

    def process(self, **env: str) -> subprocess.Popen[bytes]:
        """A stdio server that is spoken to by hand; it has answered `initialize`."""
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        server = subprocess.Popen(
            SERVER, env={**self.env, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            creationflags=flags,
        )  # fmt: skip
        self._processes.append(server)
        say(
            server,
            0,
            "initialize",
            protocolVersion="2025-11-25",
            capabilities={},
            clientInfo={"name": "x", "version": "1"},
        )
        assert hear(server, 0)["result"]["serverInfo"]
        return server

    def close(self) -> None:
        for process in self._processes:
            with suppress(OSError):
                process.kill()


def say(server: subprocess.Popen[bytes], number: int, method: str, **params: Any) -> None:
    assert server.stdin is not None
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    server.stdin.write(json.dumps(message).encode() + b"\n")
    server.stdin.flush()


def hear(server: subprocess.Popen[bytes], number: int) -> dict[str, Any]:
    assert server.stdout is not None
    while line := server.stdout.readline():
        if (message := json.loads(line)).get("id") == number:
            return message
    raise AssertionError("the server has ended")


def up(port: int, path: str) -> None:
    end = time.monotonic() + UP_WITHIN_S
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": "Bearer sk-simulated"})
    while time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(request, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody answers on port {port}")


def left(server: subprocess.Popen[bytes], code: int) -> None:
    began = time.monotonic()
    try:
        seen = server.wait(LEAVES_WITHIN_S + 10)
    except subprocess.TimeoutExpired:
        raise AssertionError("the server does not leave") from None
    assert seen == code, f"exit code {seen}, not {code}: {server.stderr.read()[-500:]!r}"
    took = time.monotonic() - began
    assert took <= LEAVES_WITHIN_S, f"it took {took:.1f} s"
    assert b"Traceback" not in server.stderr.read()


def promise(act: Callable[[Stage], Awaitable[str | None]]) -> Callable[[Stage], Awaitable[str | None]]:
    PROMISES.append(act)
    return act


async def called(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    answer = await client.call_tool(tool, arguments)
    assert answer.structured_content is not None, answer
    assert not answer.is_error, answer.content[0]
    return answer.structured_content


def whole(path: str, size: tuple[int, int] = (1024, 640)) -> None:
    with Image.open(path) as image:
        image.load()
        assert image.size == size, image.size


# --- what is promised ----------------------------------------------------------------------------------------


@promise
async def every_tool_answers_over_stdio(stage: Stage) -> None:
    async with stage.stdio() as client:
        assert len((await client.list_tools()).tools) == 6
        sized = await called(client, "compute_size", size="16:9", resolution="2K")
        assert sized["width"] == 2048
        bought = await called(client, "generate_image", **WISH)
        (image,) = bought["images"]
        assert Path(image["path"]).parent == stage.pictures.resolve(), image["path"]
        whole(image["path"])
        again = await called(client, "get_task", task_id=bought["task_id"])
        assert again["images"][0]["path"] == image["path"]
        viewed = await client.call_tool("view_image", {"task_id": bought["task_id"]})
        assert any(block.type == "image" for block in viewed.content)
        assert (await called(client, "list_tasks"))["tasks"][0]["task_id"] == bought["task_id"]
        assert "account_remaining" in json.dumps(await called(client, "get_balance"))
        assert not list(stage.pictures.glob("*.part"))


@promise
async def a_picture_over_http(stage: Stage) -> None:
    port = stage.serve("http")
    up(port, "/healthz")
    async with Client(f"http://127.0.0.1:{port}/mcp") as client:
        bought = await called(client, "generate_image", **{**WISH, "prompt": "A fox over HTTP"})
    whole(bought["images"][0]["path"])


@promise
async def references_by_the_paths_of_windows(stage: Stage) -> str:
    picture = stage.desk / "Füchse & co (1).png"
    Image.new("RGB", (64, 64), "red").save(picture)
    deep = stage.desk / "x".join(["long folder"] * 9) / "y".join(["deeper folder"] * 9)
    tried = {
        "backslashes": str(picture), "forward slashes": picture.as_posix(), "a file URI": picture.as_uri(),
        "only the name": picture.name, "another case": str(picture).upper(),
    }  # fmt: skip
    lacking = []
    try:
        deep.mkdir(parents=True)
        Image.new("RGB", (64, 64), "blue").save(deep / "long.png")
        (deep / "long.png").resolve()
        tried[f"{len(str(deep / 'long.png'))} characters"] = str(deep / "long.png")
    except OSError:
        lacking.append("paths above 260 characters")
    async with stage.stdio() as client:
        for name, source in tried.items():
            answer = await client.call_tool("generate_image", {**WISH, "prompt": f"by {name}", "image_urls": [source]})
            assert not answer.is_error, (name, answer.content[0].text)
        for name, source in {
            "a network path": r"\\server\share\fox.png", "outside": r"C:\windows\win.ini", "a drive's folder": "C:fox.png",
            "a device": r"\\.\C:", "the long form": "\\\\?\\C:\\windows\\win.ini",
        }.items():  # fmt: skip
            answer = await client.call_tool("generate_image", {**WISH, "prompt": f"by {name}", "image_urls": [source]})
            assert answer.is_error, name
            assert answer.structured_content["charged"] == "no", (name, answer.content[0].text)
    return ", ".join(tried) + (f" (lacking: {', '.join(lacking)})" if lacking else "")


@promise
async def names_that_windows_reserves_are_refused(stage: Stage) -> None:
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
            answer = await client.call_tool("generate_image", {**WISH, "prompt": f"save {name}", "save_as": name})
            assert answer.is_error, name
            assert answer.structured_content["charged"] == "no", name
        kept = await called(client, "generate_image", **{**WISH, "prompt": "save", "save_as": "sub folder/Größe.png"})
        assert kept["images"][0]["path"].endswith(r"sub folder\Größe.png"), kept["images"][0]["path"]
        again = await called(
            client, "generate_image", **{**WISH, "prompt": "save 2", "save_as": "SUB FOLDER/größe.png"}
        )
        assert again["images"][0]["path"].lower().endswith("größe-1.png"), again["images"][0]["path"]


@promise
async def the_end_of_input_ends_it(stage: Stage) -> None:
    server = stage.process()
    server.stdin.close()
    left(server, 0)


@promise
async def the_end_of_input_ends_it_while_a_call_waits(stage: Stage) -> None:
    server = stage.process()
    say(server, 1, "tools/call", name="generate_image", arguments={**WISH, "prompt": "sim:slow=60 waits"})
    time.sleep(2)
    server.stdin.close()
    left(server, 0)


@promise
async def ctrl_break_ends_it(stage: Stage) -> None:
    server = stage.process()
    try:
        server.send_signal(signal.CTRL_BREAK_EVENT)
    except (OSError, SystemError) as error:
        server.stdin.close()
        raise Lacking(f"console events ({error.__cause__ or error})") from error
    left(server, 143)


@promise
async def two_servers_share_a_journal_and_a_killed_one_is_taken_over(stage: Stage) -> None:
    async with stage.stdio() as living:
        dying = stage.process()
        arguments = {**WISH, "prompt": "sim:slow=6 of a killed server", "wait_seconds": 1}
        say(dying, 1, "tools/call", name="generate_image", arguments=arguments)
        task_id = hear(dying, 1)["result"]["structuredContent"]["task_id"]
        watched = await called(living, "get_task", task_id=task_id, wait_seconds=1)
        assert watched["status"] != "completed"
        dying.kill()
        dying.wait()
        done = await called(living, "get_task", task_id=task_id)
        assert done["status"] == "completed", done
        whole(done["images"][0]["path"])
        entries = (await called(living, "list_tasks", limit=50, detail=True))["tasks"]
        assert [entry["task_id"] for entry in entries].count(task_id) == 1


@promise
async def tasks_and_doctor_read_it(stage: Stage) -> None:
    assert "A fox" in stage.run("tasks")
    found = json.loads(stage.run("doctor", "--json"))
    assert {"findings", "hosts"} <= found.keys(), found.keys()


@promise
async def a_console_without_unicode_is_no_error(stage: Stage) -> None:
    for encoding in ("cp1252", "cp437", "utf-8"):
        told = stage.run("demo", "A fox for a console", PYTHONIOENCODING=encoding)
        assert "Done in" in told, told
        assert ("[####" in told) == (encoding == "cp1252"), told


@promise
async def a_taken_port_is_told(stage: Stage) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([*SERVER, "http", "--port", port], env=stage.env, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr, done.stderr


def main(folder: str) -> int:
    failed = passed = 0
    stage = Stage(Path(folder))
    try:
        for act in PROMISES:
            name = act.__name__.replace("_", " ")
            try:
                remark = anyio.run(act, stage) or ""
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
