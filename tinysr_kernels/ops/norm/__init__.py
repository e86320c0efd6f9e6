"""GroupNorm and LayerNorm, and the statistics that producers return for them."""
