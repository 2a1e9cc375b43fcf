"""Serve one tool that does nothing, over the SDK's stdio or over this project's stdio, as references."""

from __future__ import annotations

import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("bare", log_level="ERROR")


@server.tool()
def nothing(word: str = "") -> str:
    """Return the argument."""
    return word


def main(transport: str) -> None:
    if transport == "sdk":
        server.run("stdio")
        return
    import anyio

    from evolink_mcp.server.startup_answers import StartupAnswers
    from evolink_mcp.transports.stdio import serve_stdio
    from evolink_mcp.transports.stdio_lines import StdioLines

    async def serve(read: object, write: object) -> None:
        lowlevel = server._lowlevel_server
        await lowlevel.run(read, write, lowlevel.create_initialization_options())  # pyright: ignore[reportArgumentType]

    opening = StartupAnswers(None)
    anyio.run(serve_stdio, StdioLines(opening.answer), opening, serve)


if __name__ == "__main__":
    main(sys.argv[1])
