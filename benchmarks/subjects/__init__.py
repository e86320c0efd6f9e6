"""What is measured: networks, their operator calls, eager PyTorch, teachers and other peers."""
