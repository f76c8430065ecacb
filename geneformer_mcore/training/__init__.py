"""A run: one step, validation, set-up and the loop (floor 11)."""
