"""Triton kernels of ops/norm."""
