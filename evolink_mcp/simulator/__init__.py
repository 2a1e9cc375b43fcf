"""A simulated EvoLink for tests, the demo and development."""
