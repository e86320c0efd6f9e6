"""The networks in plain PyTorch, parameter names as in the public checkpoints: the oracle and the eager baseline."""
