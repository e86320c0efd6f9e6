"""From bytes to checked tensors: the pieces with which families read their checkpoints.

`read/` reads files without executing anything; `detect` tells files apart by content and searches folders; `sources`
finds parts in whatever a caller names; `structure`, `vae` and `transformer` check what several families have in
common; `lora`, `embeddings` and `modulation` merge and evaluate; `folded` is this project's own file. Everything
unusual is a `CheckpointError` naming file, key, expected and found. No family is known here: `families.load` is the
whole way from a path to a `Checkpoint`.
"""

from tinysr_kernels.checkpoint.folded import (
    check_replaceable,
    check_target,
    folded_metadata,
    own_metadata,
    write_folded,
    write_safetensors,
)

__all__ = [
    "check_replaceable",
    "check_target",
    "folded_metadata",
    "own_metadata",
    "write_folded",
    "write_safetensors",
]
