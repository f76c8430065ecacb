"""The store of tokenised cells: a SOMA Collection, its writer, its reader (floor 4); no torch."""
