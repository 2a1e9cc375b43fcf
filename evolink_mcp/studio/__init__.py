"""The steps of one order, from the request to the saved picture. Nothing here knows about MCP."""
