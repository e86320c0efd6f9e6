"""What a GPU would do with the launches, asked without one: a stand-in for Triton's driver, and Triton's interpreter.

    python -m tests.standin [--triton FOLDER] [--sizes all]

Under pytest kernels are interpreted, and Triton's own functions with them; what compiles them runs in other processes
(`child.py`).
"""
