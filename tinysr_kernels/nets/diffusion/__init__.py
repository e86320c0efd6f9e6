"""Networks of Stable Diffusion 2.1 and 3 and what is folded into them, for the one-step families that use them."""
