"""Cells x genes from files and to files (floor 3); no torch."""
