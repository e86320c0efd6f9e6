"""The autotuner: measures which launch configurations are fastest on a GPU. Run `python -m autotune` in a checkout."""
