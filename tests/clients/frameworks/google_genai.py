"""google-genai: the tools of an MCP session as tools of `generate_content`. The script runs the call and returns its text."""

import asyncio

from google import genai
from google.genai import types
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from order import KEY, MODEL_URL, ORDER, TARGET, report


async def main() -> None:
    server = StdioServerParameters(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
    client = genai.Client(api_key=KEY, http_options=types.HttpOptions(base_url=MODEL_URL))
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        # A session as a tool fails in 3.6.1 before the first request: it cannot be copied.
        config = types.GenerateContentConfig(tools=[*(await session.list_tools()).tools])
        contents = [types.Content(role="user", parts=[types.Part(text=ORDER)])]
        first = await client.aio.models.generate_content(model="gemini-fake", contents=contents, config=config)
        call = first.function_calls[0]
        result = await session.call_tool(call.name, dict(call.args))
        text = "\n".join(block.text for block in result.content if block.type == "text")
        contents += [
            first.candidates[0].content,
            types.Content(
                role="user", parts=[types.Part.from_function_response(name=call.name, response={"result": text})]
            ),
        ]
        await client.aio.models.generate_content(model="gemini-fake", contents=contents, config=config)
    report("google-genai")


asyncio.run(main())
