"""The time of kernels predicted from their machine code: no GPU is needed, and nothing here is a measurement."""
