"""Pixels to the bytes of image files that Pillow cannot write."""
