"""MCP server for EvoLink's asynchronous image API (gpt-image-2): paid once, never lost."""

__version__ = "0.1.0"
