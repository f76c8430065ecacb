"""Devices, process groups, collectives and the watchdog (floor 6)."""
