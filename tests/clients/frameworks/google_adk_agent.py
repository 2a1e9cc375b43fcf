"""Google ADK: an agent with `McpToolset`, and Gemini's API as the model."""

import asyncio
import os

from order import KEY, MODEL_URL, ORDER, TARGET, report

os.environ["GOOGLE_API_KEY"] = KEY
os.environ["GOOGLE_GEMINI_BASE_URL"] = MODEL_URL

from google.adk.agents import LlmAgent
from google.adk.runners import InMemoryRunner
from google.adk.tools.mcp_tool import McpToolset, StdioConnectionParams
from google.genai import types
from mcp import StdioServerParameters


async def main() -> None:
    server = StdioServerParameters(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
    toolset = McpToolset(connection_params=StdioConnectionParams(server_params=server, timeout=120))
    agent = LlmAgent(name="painter", model="gemini-fake", tools=[toolset])
    runner = InMemoryRunner(agent=agent, app_name="painter")
    session = await runner.session_service.create_session(app_name="painter", user_id="user")
    message = types.Content(role="user", parts=[types.Part(text=ORDER)])
    async for _ in runner.run_async(user_id="user", session_id=session.id, new_message=message):
        pass
    await toolset.close()
    report("google-adk")


asyncio.run(main())
