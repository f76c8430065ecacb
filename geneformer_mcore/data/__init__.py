"""Cells of a rank, in order, with masked genes, as micro batches (floor 6)."""
