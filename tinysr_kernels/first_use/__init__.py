"""What happens once per GPU: kernels compiled ahead of their first launch, and their results checked."""
