"""A run: one step, evaluation, set-up and the loop (floor 9)."""
