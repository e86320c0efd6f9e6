"""Images larger than memory: limits, cutting into tiles, running a network on them."""
