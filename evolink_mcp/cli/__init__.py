"""The commands of `evolink-mcp`."""
