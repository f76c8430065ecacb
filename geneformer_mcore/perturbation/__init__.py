"""Genes deleted or overexpressed in silico (floor 12)."""
