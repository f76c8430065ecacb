"""Learning rate, gradients and AdamW (floor 8)."""
