"""Which cells are hidden. One file a mask, drawn in numpy by the loader's workers from (seed, position)."""
