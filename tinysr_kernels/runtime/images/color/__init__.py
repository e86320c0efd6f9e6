"""Color spaces: ICC profiles read, applied and written, and the labels that mean the same as a profile."""
