"""openai-agents: an agent with strict schemas, over the chat completions API or the responses API."""

import asyncio

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from agents.mcp import MCPServerStdio
from openai import AsyncOpenAI
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(api_key=KEY, base_url=f"{MODEL_URL}/v1")
    kind = OpenAIResponsesModel if TARGET["mode"] == "responses" else OpenAIChatCompletionsModel
    params = {name: TARGET[name] for name in ("command", "args", "env")}
    async with MCPServerStdio(params, client_session_timeout_seconds=120) as server:
        agent = Agent(
            "painter", model=kind("fake", client), mcp_servers=[server],
            mcp_config={"convert_schemas_to_strict": True},
        )  # fmt: skip
        await Runner.run(agent, ORDER)
    report("openai-agents")


asyncio.run(main())
