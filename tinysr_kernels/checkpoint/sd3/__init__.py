"""Stable Diffusion 3's joint transformer in diffusers' layout, and the embeddings of a prompt for it."""
