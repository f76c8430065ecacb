"""Models of others as runs of ours, and back (floor 12)."""
