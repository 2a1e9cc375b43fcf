"""What the product costs in time and memory, measured beside the thing it is compared with: `python -m benchmarks`."""
