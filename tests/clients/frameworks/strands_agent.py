"""Strands Agents: an agent with an `MCPClient`."""

from mcp import StdioServerParameters
from mcp.client.stdio import stdio_client
from order import KEY, MODEL_URL, ORDER, TARGET, report
from strands import Agent
from strands.models.openai import OpenAIModel
from strands.tools.mcp import MCPClient

server = StdioServerParameters(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
model = OpenAIModel(client_args={"api_key": KEY, "base_url": f"{MODEL_URL}/v1"}, model_id="fake")
with MCPClient(lambda: stdio_client(server), startup_timeout=120) as client:
    Agent(model=model, tools=client.list_tools_sync(), callback_handler=None)(ORDER)
report("strands-agents")
