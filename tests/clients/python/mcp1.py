"""The Python SDK 1.x: `ClientSession`, including versions of early 2025."""

import inspect
from contextlib import asynccontextmanager

import anyio
from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, report, result_of
from mcp import ClientSession, StdioServerParameters
from mcp.client.sse import sse_client
from mcp.client.stdio import stdio_client


@asynccontextmanager
async def streams():
    if TRANSPORT == "stdio":
        parameters = StdioServerParameters(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
        async with stdio_client(parameters) as pair:
            yield pair
    elif TRANSPORT == "sse":
        async with sse_client(TARGET["url"]) as pair:
            yield pair
    else:
        from mcp.client.streamable_http import streamablehttp_client

        async with streamablehttp_client(TARGET["url"]) as (read, write, _):
            yield read, write


async def main() -> None:
    reports = []

    async def progress(value, total, message) -> None:
        reports.append(value)

    async with streams() as (read, write), ClientSession(read, write) as session:
        handshake = await session.initialize()
        tools = [tool.name for tool in (await session.list_tools()).tools]
        size = result_of(await session.call_tool(*SIZE))
        has_progress = "progress_callback" in inspect.signature(session.call_tool).parameters
        fields = {"progress_callback": progress} if has_progress else {}
        image = result_of(await session.call_tool(*IMAGE, **fields), progress=reports if has_progress else None)
        bad = result_of(await session.call_tool(*BAD))
        report("mcp", str(handshake.protocolVersion), tools, size, image, bad)


anyio.run(main)
