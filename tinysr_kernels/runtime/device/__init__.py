"""Devices: streams, CUDA graphs, host and device memory."""
