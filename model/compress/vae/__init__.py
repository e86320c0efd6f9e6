"""Compressing the teacher's VAE: channel pruning, separable convolutions, the tiny VAE and its training."""
