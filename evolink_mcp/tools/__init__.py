"""The MCP tools, one module each, and the modules that they share."""
