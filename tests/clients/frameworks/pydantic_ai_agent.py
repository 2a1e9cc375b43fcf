"""pydantic-ai: an agent with its `MCPToolset` and OpenAI's schema converter."""

import asyncio

from fastmcp.client.transports import StdioTransport
from order import KEY, MODEL_URL, ORDER, TARGET, report
from pydantic_ai import Agent
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


async def main() -> None:
    model = OpenAIChatModel("gpt-fake", provider=OpenAIProvider(base_url=f"{MODEL_URL}/v1", api_key=KEY))
    server = StdioTransport(TARGET["command"], TARGET["args"], env=TARGET["env"], keep_alive=False)
    async with Agent(model, toolsets=[MCPToolset(server)]) as agent:
        await agent.run(ORDER)
    report("pydantic-ai-slim")


asyncio.run(main())
