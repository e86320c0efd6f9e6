"""The compiled model: images in and out, tiling, colour fix."""
