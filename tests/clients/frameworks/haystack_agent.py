"""Haystack: an agent with `MCPToolset` of mcp-haystack."""

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from haystack_integrations.tools.mcp import MCPToolset, StdioServerInfo
from order import KEY, MODEL_URL, ORDER, TARGET, report

server = StdioServerInfo(command=TARGET["command"], args=TARGET["args"], env=TARGET["env"])
toolset = MCPToolset(server, connection_timeout=120, invocation_timeout=120)
model = OpenAIChatGenerator(model="fake", api_key=Secret.from_token(KEY), api_base_url=f"{MODEL_URL}/v1")
agent = Agent(chat_generator=model, tools=toolset)
agent.run(messages=[ChatMessage.from_user(ORDER)])
toolset.close()
report("mcp-haystack")
