"""openai-agents: its MCP servers, with our schemas converted to strict ones."""

import asyncio

from agents import Agent, RunContextWrapper
from agents.mcp import MCPServerSse, MCPServerStdio, MCPServerStreamableHttp, MCPUtil
from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, report, result_of

# Its default is 5 s for every answer, which is too short for a picture.
ANSWER_WITHIN_S = 120


def server():
    if TRANSPORT == "stdio":
        params = {name: TARGET[name] for name in ("command", "args", "env")}
        return MCPServerStdio(params, client_session_timeout_seconds=ANSWER_WITHIN_S)
    kind = MCPServerStreamableHttp if TRANSPORT == "http" else MCPServerSse
    return kind({"url": TARGET["url"]}, client_session_timeout_seconds=ANSWER_WITHIN_S)


async def main() -> None:
    async with server() as mcp:
        tools = await MCPUtil.get_function_tools(mcp, True, RunContextWrapper(None), Agent("none"))
        # 0.24.0 keeps an object without properties as it is.
        not_strict = [
            tool.name for tool in tools if tool.params_json_schema["properties"] and not tool.strict_json_schema
        ]
        assert not_strict == [], "a schema cannot be made strict"
        size = result_of(await mcp.call_tool(*SIZE))
        image = result_of(await mcp.call_tool(*IMAGE))
        bad = result_of(await mcp.call_tool(*BAD))
        report("openai-agents", "", [tool.name for tool in tools], size, image, bad)


asyncio.run(main())
