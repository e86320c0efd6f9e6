"""Operators on the image itself: resizing, color fixes, range maps."""
