"""From counts of single cells to ranked token ids (floor 4); no torch, no TileDB."""
