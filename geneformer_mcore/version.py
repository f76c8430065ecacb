"""The version, read by setup.py too (floor 0)."""

__version__ = "0.1.0"
