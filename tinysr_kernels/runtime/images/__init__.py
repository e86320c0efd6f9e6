"""Images in memory: arrays, PIL images, alpha, color profiles, metadata."""
