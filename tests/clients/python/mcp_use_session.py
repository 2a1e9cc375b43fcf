"""mcp-use: a session from a configuration file in the form of MCP hosts."""

import asyncio
import os

os.environ["MCP_USE_ANONYMIZED_TELEMETRY"] = "false"

from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, report, result_of
from mcp_use import MCPClient


async def main() -> None:
    connection = {name: TARGET[name] for name in ("command", "args", "env", "url") if name in TARGET}
    if TRANSPORT == "sse":
        connection["transport"] = "sse"
    client = MCPClient.from_dict({"mcpServers": {"evolink": connection}})
    session = await client.create_session("evolink")
    tools = [tool.name for tool in await session.list_tools()]
    size = result_of(await session.call_tool(*SIZE))
    image = result_of(await session.call_tool(*IMAGE))
    bad = result_of(await session.call_tool(*BAD))
    await client.close_all_sessions()
    report("mcp-use", "", tools, size, image, bad)


asyncio.run(main())
