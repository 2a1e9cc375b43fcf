"""MCP server for EvoLink's asynchronous image API (gpt-image-2): paid once, never lost."""

__version__ = "1.0.0.dev0"
