"""The measuring commands of `python -m benchmarks`."""
