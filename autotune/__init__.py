"""Measures which launch configurations are fastest on a GPU; run from a checkout with `python -m autotune`."""
