"""The prediction of kernel times from machine code."""
