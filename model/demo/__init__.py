"""The demonstration checkpoint: procedural training images, degradation, training, evaluation on photographs."""
