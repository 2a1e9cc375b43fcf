"""mcp-use: its agent, with a LangChain model."""

import asyncio
import os

os.environ["MCP_USE_ANONYMIZED_TELEMETRY"] = "false"

from langchain_openai import ChatOpenAI
from mcp_use import MCPAgent, MCPClient
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    server = {name: TARGET[name] for name in ("command", "args", "env")}
    client = MCPClient.from_dict({"mcpServers": {"evolink": server}})
    model = ChatOpenAI(model="fake", api_key=KEY, base_url=f"{MODEL_URL}/v1")
    await MCPAgent(llm=model, client=client, max_steps=5).run(ORDER)
    await client.close_all_sessions()
    report("mcp-use")


asyncio.run(main())
