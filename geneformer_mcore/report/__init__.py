"""Finished and stopped runs, and stores, as tables and plots (floor 10)."""
