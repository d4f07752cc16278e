"""timm's own names, which MAE, DINO, DeiT, lightly (over timm's ViT), solo-learn and others keep."""

from mpp.keymap import rule

RULES = (rule(r"(.+)", "{0}"),)
