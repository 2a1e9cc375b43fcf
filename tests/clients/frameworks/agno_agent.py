"""Agno: an agent with `MCPTools`."""

import asyncio

from agno.agent import Agent
from agno.models.openai import OpenAIChat
from agno.tools.mcp import MCPTools
from mcp import StdioServerParameters
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    server = StdioServerParameters(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
    async with MCPTools(server_params=server, transport="stdio", timeout_seconds=120) as tools:
        model = OpenAIChat(id="fake", api_key=KEY, base_url=f"{MODEL_URL}/v1")
        await Agent(model=model, tools=[tools], telemetry=False).arun(ORDER)
    report("agno")


asyncio.run(main())
