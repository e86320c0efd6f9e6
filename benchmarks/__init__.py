"""Measurements of the kernels and networks; run from a checkout with `python -m benchmarks`."""
