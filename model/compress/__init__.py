"""The compression recipe (arXiv 2508.17434): from a one-step teacher built on SD3 to a TinySR checkpoint."""
