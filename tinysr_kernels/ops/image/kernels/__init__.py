"""Triton kernels of ops/image."""
