"""The model card's benchmark of cell types (floor 12)."""
