"""Order, buy, poll and save images. This package does not know MCP."""
