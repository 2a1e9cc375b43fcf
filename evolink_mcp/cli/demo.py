"""The command `demo`: a real MCP client calls this server over stdio. The server uses a simulated EvoLink."""

from __future__ import annotations

import secrets
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import anyio
import uvicorn
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp_types import CallToolResult, TextContent

from evolink_mcp.api.task import as_dict, as_list
from evolink_mcp.app.environment import environment_without_settings
from evolink_mcp.cli.host_config import command_line, installed_command
from evolink_mcp.cli.image_commands import DEMO_JOURNAL, demo_folder
from evolink_mcp.cli.terminal import ProgressLine, Terminal
from evolink_mcp.isolated import isolated_command
from evolink_mcp.simulator.app import Simulator

TASK_S = 5.0
SIZE = {"size": "16:9", "resolution": "2K", "quality": "medium"}
# The isolated server process imports packages only from the folders of these.
SERVER_REQUIREMENTS = ("mcp", "mcp_types", "httpx2", "pydantic", "anyio", "PIL", "platformdirs", "filelock")


async def run_demo(prompt: str, output: Path, data_dir: Path, terminal: Terminal) -> int:
    """Generate one image beside the folder `output` and print the result. Return the exit code."""
    terminal.print(
        "evolink-mcp demo: a real MCP client, a real server, a simulated EvoLink. No key, no network, no cost."
    )
    terminal.print()
    terminal.print(f'generate_image(prompt="{prompt}", size="16:9", resolution="2K")', "  ", "      ")
    terminal.print()
    simulator = Simulator(duration_s=TASK_S)
    web = uvicorn.Server(uvicorn.Config(simulator.app, port=0, log_level="error", lifespan="off"))
    code = 1
    async with anyio.create_task_group() as group:
        group.start_soon(web.serve)
        # uvicorn reports its start only by this attribute.
        while not web.started:
            await anyio.sleep(0.01)
        port = web.servers[0].sockets[0].getsockname()[1]
        start = time.monotonic()
        try:
            answer = await _generate(prompt, port, data_dir / DEMO_JOURNAL, demo_folder(output), terminal)
            code = _report_result(answer, time.monotonic() - start, terminal)
        finally:
            web.should_exit = True
    return code


async def _generate(prompt: str, port: int, data_dir: Path, output: Path, terminal: Terminal) -> CallToolResult:
    command, *arguments = isolated_command("evolink_mcp.cli.main:main", SERVER_REQUIREMENTS)
    server = StdioServerParameters(
        command=command,
        args=arguments,
        env={
            **environment_without_settings(),
            "NO_PROXY": "127.0.0.1",  # a proxy cannot reach the simulator on this machine
            "no_proxy": "127.0.0.1",
            "EVOLINK_BASE_URL": f"http://127.0.0.1:{port}",
            "EVOLINK_API_KEY": "sk-demo-no-money",
            # Each demo has another simulated account. In a profile of its own it does not ask for the earlier ones.
            "EVOLINK_MCP_PROFILE": f"demo-{secrets.token_hex(4)}",
            "EVOLINK_MCP_DATA_DIR": str(data_dir),
            "EVOLINK_MCP_OUTPUT_DIR": str(output),
        },
    )
    bar = ProgressLine(terminal, _write)

    async def show(progress: float, total: float | None, message: str | None) -> None:
        bar.show(progress, message or "")

    try:
        async with Client(server) as client:
            return await client.call_tool("generate_image", {"prompt": prompt, **SIZE}, progress_callback=show)
    finally:  # after Ctrl-C too, so that the prompt of the terminal is on a new line
        bar.end()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _report_result(answer: CallToolResult, duration_s: float, terminal: Terminal) -> int:
    facts = as_dict(answer.structured_content)
    images = [image for image in map(as_dict, as_list(facts.get("images"))) if image["path"]]
    if answer.is_error or not images:
        terminal.print(next(block.text for block in answer.content if isinstance(block, TextContent)))
        return 1
    for image in images:
        terminal.print()
        terminal.print_path(Path(image["path"]), "  ")
        terminal.print(
            f"{image['width']} × {image['height']} pixels, {image['bytes']:,} bytes, {image['mime_type']}", "  "
        )
    price = f"about {facts['credits']:g} credits (${facts['usd']:.3f})"
    terminal.print()
    terminal.print(f"Done in {duration_s:.1f} s. At EvoLink the same call costs {price} and takes 10 to 130 s.")
    terminal.print("The image is simulated. It is saved in a separate folder.")
    program = _program()
    terminal.print("Next step:")
    terminal.print(f"{program} install    adds the server to the configuration of your MCP hosts", "  ", "    ")
    terminal.print(f"{program} open       shows the folder of the image", "  ", "    ")
    return 0


def _program() -> str:
    """Return the command that starts this installation in the current folder."""
    command, arguments = installed_command()
    in_path = shutil.which("evolink-mcp")
    if in_path is not None and not arguments and Path(in_path).resolve() == Path(command).resolve():
        return "evolink-mcp"
    with suppress(ValueError):  # it may be outside the current folder
        command = str(Path(command).relative_to(Path.cwd()))
    return command_line([command, *arguments])
