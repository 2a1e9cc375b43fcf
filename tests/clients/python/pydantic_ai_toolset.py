"""pydantic-ai: its `MCPToolset`, which hands structured content on and turns an error into a retry."""

import asyncio

from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, report, seen
from fastmcp.client.transports import SSETransport, StdioTransport, StreamableHttpTransport
from pydantic_ai.exceptions import ModelRetry
from pydantic_ai.mcp import MCPToolset


def transport():
    if TRANSPORT == "stdio":
        return StdioTransport(TARGET["command"], TARGET["args"], env=TARGET["env"], keep_alive=False)
    return (StreamableHttpTransport if TRANSPORT == "http" else SSETransport)(TARGET["url"])


async def main() -> None:
    async with MCPToolset(transport()) as toolset:
        tools = [tool.name for tool in await toolset.list_tools()]

        async def call(name: str, arguments: dict) -> dict:
            try:
                told = await toolset.direct_call_tool(name, arguments)
            except ModelRetry as error:
                return seen(str(error), None, True)
            parts = told if isinstance(told, list) else [told]
            texts = [part for part in parts if isinstance(part, str)]
            structured = next((part for part in parts if isinstance(part, dict)), None)
            return seen("\n".join(texts), structured, False)

        size, image, bad = await call(*SIZE), await call(*IMAGE), await call(*BAD)
        report("pydantic-ai-slim", "", tools, size, image, bad)


asyncio.run(main())
