"""accelerate() and restore(): diffusers' autoencoders computed by the fused operators, in place.

`structure.py` reads what a half (the encoder, the decoder) is made of, and refuses by name what it does not know;
`weights.py` tells whether weights have changed; `half.py` is what takes the place of a half's `forward`;
`accelerate.py` puts it there and takes it away. diffusers itself is never imported.
"""
