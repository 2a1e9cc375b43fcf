"""EvoLink simulated, for tests, the demo and anybody who builds on this server."""
