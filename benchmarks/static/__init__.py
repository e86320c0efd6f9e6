"""Analysis that needs no GPU: launch plans, machine code, and the documentation pages generated from them."""
