"""LangChain: an agent with the tools of langchain-mcp-adapters, in the strict form of OpenAI."""

import asyncio

from langchain.agents import create_agent
from langchain_mcp_adapters.client import MultiServerMCPClient
from langchain_openai import ChatOpenAI
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    server = {name: TARGET[name] for name in ("command", "args", "env")}
    tools = await MultiServerMCPClient({"evolink": {"transport": "stdio", **server}}).get_tools()
    model = ChatOpenAI(model="fake", api_key=KEY, base_url=f"{MODEL_URL}/v1")
    model.bind_tools(tools, strict=True)
    agent = create_agent(model, tools)
    await agent.ainvoke({"messages": [{"role": "user", "content": ORDER}]})
    report("langchain-mcp-adapters")


asyncio.run(main())
