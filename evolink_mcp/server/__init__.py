"""One MCP server: the tools, and the resources, prompts, gallery and Tasks extension beside them."""
