"""The Triton kernels beneath the operators: numbers in the interpreter (or on a GPU), machine code ahead of time."""
