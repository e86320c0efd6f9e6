"""The compiled model: images in and out, tiling, color fix."""
