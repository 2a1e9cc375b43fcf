"""LlamaIndex: a function agent with the tools of llama-index-tools-mcp."""

import asyncio

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai_like import OpenAILike
from llama_index.tools.mcp import BasicMCPClient, McpToolSpec
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    client = BasicMCPClient(TARGET["command"], args=TARGET["args"], env=TARGET["env"])
    tools = await McpToolSpec(client).to_tool_list_async()
    model = OpenAILike(
        model="fake", api_key=KEY, api_base=f"{MODEL_URL}/v1", is_chat_model=True, is_function_calling_model=True
    )
    await FunctionAgent(tools=tools, llm=model, streaming=False).run(ORDER)
    report("llama-index-tools-mcp")


asyncio.run(main())
