"""Triton kernels of ops/conv."""
