"""The Python SDK 2.x: `Client` with negotiation (auto) or with the older handshake (legacy)."""

import anyio
from calls import BAD, IMAGE, MODE, SIZE, SLOW, TARGET, TRANSPORT, report, result_of
from mcp.client import Client
from mcp.client.sse import sse_client
from mcp.client.stdio import StdioServerParameters
from mcp.shared.exceptions import MCPError


def server():
    if TRANSPORT == "stdio":
        return StdioServerParameters(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
    return TARGET["url"] if TRANSPORT == "http" else sse_client(TARGET["url"])


async def main() -> None:
    reports = []

    async def progress(value, total, message) -> None:
        reports.append(value)

    async with Client(server(), mode=MODE) as client:
        tools = [tool.name for tool in (await client.list_tools()).tools]
        size = result_of(await client.call_tool(*SIZE))
        image = result_of(await client.call_tool(*IMAGE, progress_callback=progress), progress=reports)
        bad = result_of(await client.call_tool(*BAD))
        gave_up = False
        try:
            await client.call_tool(*SLOW, read_timeout_seconds=3)
        except MCPError:
            gave_up = True
        again = result_of(await client.call_tool(*SLOW), gaveUp=gave_up)
        report("mcp", client.protocol_version, tools, size, image, bad, again=again)


anyio.run(main)
