"""Devices, process groups and collectives (floor 5)."""
