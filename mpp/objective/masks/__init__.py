"""Masks: which units are hidden, one file per mask. Dataloader workers draw them with numpy from (seed, position)."""
