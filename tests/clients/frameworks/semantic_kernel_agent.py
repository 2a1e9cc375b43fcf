"""Semantic Kernel: an agent with an `MCPStdioPlugin`."""

import asyncio

from openai import AsyncOpenAI
from order import KEY, MODEL_URL, ORDER, TARGET, report
from semantic_kernel.agents import ChatCompletionAgent
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion
from semantic_kernel.connectors.mcp import MCPStdioPlugin


async def main() -> None:
    client = AsyncOpenAI(api_key=KEY, base_url=f"{MODEL_URL}/v1")
    server = {name: TARGET[name] for name in ("command", "args", "env")}
    async with MCPStdioPlugin(name="evolink", load_prompts=False, **server) as plugin:
        service = OpenAIChatCompletion(ai_model_id="fake", async_client=client)
        await ChatCompletionAgent(service=service, name="painter", plugins=[plugin]).get_response(ORDER)
    report("semantic-kernel")


asyncio.run(main())
