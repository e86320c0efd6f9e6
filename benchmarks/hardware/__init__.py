"""What GPUs cannot exceed."""
