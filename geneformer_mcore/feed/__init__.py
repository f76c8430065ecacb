"""Which cells a rank sees, in which order, with which genes masked (floor 5)."""
