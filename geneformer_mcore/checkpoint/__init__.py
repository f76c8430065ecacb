"""Step folders: saved, verified, restored (floor 9)."""
