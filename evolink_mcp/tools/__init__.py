"""The MCP tools, one file each, and what several of them share."""
