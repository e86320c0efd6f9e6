"""Small random checkpoints in the published layouts, with the networks they describe."""
