"""From counts of single cells to ranked token ids (floor 3); no torch, no TileDB."""
