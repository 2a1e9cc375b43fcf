"""Microsoft Agent Framework: an agent with an `MCPStdioTool`."""

import asyncio

from agent_framework import Agent, MCPStdioTool
from agent_framework.openai import OpenAIChatCompletionClient
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    model = OpenAIChatCompletionClient(model="fake", api_key=KEY, base_url=f"{MODEL_URL}/v1")
    server = {name: TARGET[name] for name in ("command", "args", "env")}
    async with (
        MCPStdioTool(name="evolink", load_prompts=False, **server) as tool,
        Agent(client=model, tools=[tool]) as agent,
    ):
        await agent.run(ORDER)
    report("agent-framework-core")


asyncio.run(main())
