"""Learning rate, gradients and AdamW (floor 7)."""
