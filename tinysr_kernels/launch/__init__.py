"""Which backend an operator runs on, with which launch configuration, and how its kernels are launched.

`backend` chooses between kernels and references, `configs` picks a launch configuration and reports its source,
`kernel` compiles plain functions with Triton on first use, `plan` holds launches as data before anything runs.
"""
