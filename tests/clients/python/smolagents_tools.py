"""smolagents: MCP tools as its own tools. It uses only the first block of an answer."""

from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, answer_of, report
from mcp import StdioServerParameters
from smolagents import MCPClient


def server():
    if TRANSPORT == "stdio":
        return StdioServerParameters(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
    return {"url": TARGET["url"], "transport": "streamable-http" if TRANSPORT == "http" else "sse"}


with MCPClient(server(), structured_output=False) as tool_list:
    tools = {tool.name: tool for tool in tool_list}
    # It does not distinguish an error from an answer.
    size, image, bad = (answer_of(tools[name](**arguments), error=None) for name, arguments in (SIZE, IMAGE, BAD))
report("smolagents", "", list(tools), size, image, bad)
