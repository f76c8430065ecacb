"""The store of tokenised cells: a SOMA Collection, its reader, its checks (floor 5); no torch."""
