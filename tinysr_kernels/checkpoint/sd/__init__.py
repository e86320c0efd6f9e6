"""Stable Diffusion's modules in diffusers' layout: UNet, KL VAE, noise schedule, prompt."""
