"""Whole one-step systems on Stable Diffusion's networks in plain PyTorch: OSEDiff with its relatives, TSD-SR."""
