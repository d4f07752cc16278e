"""Heads: from the encoder's tokens to predictions. Each starts with a LayerNorm, because the last block is read raw."""
