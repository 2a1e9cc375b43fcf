"""The MCP server: tools, resources, prompts, gallery and the Tasks extension."""
