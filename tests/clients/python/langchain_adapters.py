"""langchain-mcp-adapters: MCP tools as LangChain tools, called as an agent calls them."""

import asyncio

from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, answer_of, report
from langchain_mcp_adapters.client import MultiServerMCPClient

KIND = {"stdio": "stdio", "http": "streamable_http", "sse": "sse"}[TRANSPORT]


async def main() -> None:
    connection = {name: TARGET[name] for name in ("command", "args", "env", "url") if name in TARGET}
    client = MultiServerMCPClient({"evolink": {"transport": KIND, **connection}})
    tools = {tool.name: tool for tool in await client.get_tools()}

    async def call(name: str, arguments: dict) -> dict:
        message = await tools[name].ainvoke({"type": "tool_call", "id": "1", "name": name, "args": arguments})
        blocks = message.content if isinstance(message.content, list) else [{"type": "text", "text": message.content}]
        text = "\n".join(block["text"] for block in blocks if block["type"] == "text")
        artifact = message.artifact or {}
        structured = artifact.get("structured_content") if isinstance(artifact, dict) else None
        return answer_of(text, structured, message.status == "error")

    size, image, bad = await call(*SIZE), await call(*IMAGE), await call(*BAD)
    report("langchain-mcp-adapters", "", list(tools), size, image, bad)


asyncio.run(main())
