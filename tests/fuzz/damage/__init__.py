"""Ways of damaging checkpoints: their bytes and pickles, their JSON texts, the files themselves."""
