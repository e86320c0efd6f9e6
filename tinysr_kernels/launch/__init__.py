"""Which implementation an operation gets on which device, with which launch configuration, and how it is launched.

`backend` decides between kernels and references, `configs` picks a configuration and says where it came from, `kernel`
makes Triton kernels of plain functions on first use, `plan` holds what a launcher asks for before anything runs.
"""
