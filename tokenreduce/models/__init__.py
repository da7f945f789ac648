"""Model families: one file each, saying where a model's visual tokens, grids, layers and packing are."""
