"""Readable reference networks in plain PyTorch: what each network computes, under the public parameter names."""
