"""The commands of `python -m autotune`."""
