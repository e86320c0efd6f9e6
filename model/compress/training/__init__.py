"""What the recipe's stages of training share: optimizer, losses, LoRA layers, training pairs."""
