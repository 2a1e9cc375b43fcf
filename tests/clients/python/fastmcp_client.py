"""FastMCP's client, versions 2 and 4."""

from importlib.metadata import distributions

import anyio
from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, report, result_of
from fastmcp import Client
from fastmcp.client.transports import SSETransport, StdioTransport, StreamableHttpTransport


def transport():
    if TRANSPORT == "stdio":
        return StdioTransport(TARGET["command"], TARGET["args"], env=TARGET["env"], keep_alive=False)
    return (StreamableHttpTransport if TRANSPORT == "http" else SSETransport)(TARGET["url"])


async def main() -> None:
    reports = []

    async def progress(value, total, message) -> None:
        reports.append(value)

    async with Client(transport(), progress_handler=progress) as client:
        tools = [tool.name for tool in await client.list_tools()]
        size = result_of(await client.call_tool(*SIZE, raise_on_error=False))
        image = result_of(await client.call_tool(*IMAGE, raise_on_error=False), progress=reports)
        bad = result_of(await client.call_tool(*BAD, raise_on_error=False))
        names = {package.metadata["Name"] for package in distributions()}
        session = client.session
        protocol = getattr(session, "protocol_version", None) or getattr(
            client.initialize_result, "protocolVersion", ""
        )
        report("fastmcp" if "fastmcp" in names else "fastmcp-slim", str(protocol), tools, size, image, bad)


anyio.run(main)
