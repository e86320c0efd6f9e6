"""The package's own files: what they list of their tensors, and how they are written."""
