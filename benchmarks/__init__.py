"""Measurements, each run from the root of the clone: `python -m benchmarks.speed`, `.quality`, `.peers`."""
