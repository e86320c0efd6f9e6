"""Image files to pixels: what is accepted, its limits, and the decoders."""
