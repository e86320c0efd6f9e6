"""Doors for other programs, each optional and thin."""
