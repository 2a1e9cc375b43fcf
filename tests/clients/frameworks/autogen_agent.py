"""AutoGen: an assistant with an `McpWorkbench`."""

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelFamily
from autogen_ext.models.openai import OpenAIChatCompletionClient
from autogen_ext.tools.mcp import McpWorkbench, StdioServerParams
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    server = StdioServerParams(
        command=TARGET["command"], args=TARGET["args"], env=TARGET["env"], read_timeout_seconds=120
    )
    info = {
        "vision": True, "function_calling": True, "json_output": True, "structured_output": True,
        "family": ModelFamily.UNKNOWN,
    }  # fmt: skip
    model = OpenAIChatCompletionClient(model="fake", api_key=KEY, base_url=f"{MODEL_URL}/v1", model_info=info)
    async with McpWorkbench(server) as workbench:
        await AssistantAgent("painter", model, workbench=workbench, reflect_on_tool_use=True).run(task=ORDER)
    report("autogen-ext")


asyncio.run(main())
