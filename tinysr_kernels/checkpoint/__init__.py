"""Find, read, check and normalise every checkpoint format the project accepts.

`load` turns whatever a user has (a folder, a file, a dict of parts, a module, "demo") into one `Checkpoint`: a family,
a configuration and plain tensors under normalised names. Everything unusual is a `CheckpointError`; nothing from a
checkpoint is executed.
"""

from tinysr_kernels.checkpoint.folded import folded_metadata, write_safetensors
from tinysr_kernels.checkpoint.loading import load
from tinysr_kernels.checkpoint.result import Checkpoint

__all__ = ["Checkpoint", "folded_metadata", "load", "write_safetensors"]
