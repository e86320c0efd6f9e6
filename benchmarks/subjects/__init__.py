"""What is benchmarked: networks, their operator calls, and baselines: eager PyTorch, torch.compile, the teachers."""
