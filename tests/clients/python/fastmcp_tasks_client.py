"""FastMCP with fastmcp-tasks: a client of the Tasks extension that polls a task handle."""

import anyio
from calls import BAD, IMAGE, SIZE, TARGET, TRANSPORT, report, result_of
from fastmcp import Client
from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from fastmcp_tasks import call_tool_task


def transport():
    if TRANSPORT == "stdio":
        return StdioTransport(TARGET["command"], TARGET["args"], env=TARGET["env"], keep_alive=False)
    return StreamableHttpTransport(TARGET["url"])


async def main() -> None:
    async with Client(transport()) as client:
        tools = [tool.name for tool in await client.list_tools()]
        size = result_of(await client.call_tool(*SIZE, raise_on_error=False))
        task = await call_tool_task(client, *IMAGE)
        assert task.task_id.startswith("task-unified-"), "the handle is not EvoLink's id"
        assert (await task.status()).status == "working"
        image = result_of(await task.result())
        bad = result_of(await client.call_tool(*BAD, raise_on_error=False))
        report("fastmcp-tasks", f"{client.session.protocol_version}, as a task", tools, size, image, bad)


anyio.run(main)
