"""From the encoder's tokens to predictions. Each begins with its own LayerNorm: it reads the last block raw."""
