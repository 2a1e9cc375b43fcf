"""pydantic-ai: its `MCPToolset`, which returns structured content and turns an error into a retry."""

import asyncio

from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, answer_of, report
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
                message = await toolset.direct_call_tool(name, arguments)
            except ModelRetry as error:
                return answer_of(str(error), None, True)
            parts = message if isinstance(message, list) else [message]
            texts = [part for part in parts if isinstance(part, str)]
            structured = next((part for part in parts if isinstance(part, dict)), None)
            return answer_of("\n".join(texts), structured, False)

        size, image, bad = await call(*SIZE), await call(*IMAGE), await call(*BAD)
        report("pydantic-ai-slim", "", tools, size, image, bad)


asyncio.run(main())
