"""The transports of MCP messages: stdin and stdout, or HTTP."""
