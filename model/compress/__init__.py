"""The compression recipe: from a one-step diffusion teacher to a TinySR checkpoint (arXiv 2508.17434)."""
