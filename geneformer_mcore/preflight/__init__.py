"""Checks of a cluster before a run (floor 12)."""
