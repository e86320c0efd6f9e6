"""Convolutions with everything fused into them."""
