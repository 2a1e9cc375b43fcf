"""Measure time and memory of the server against references: `python -m benchmarks`."""
