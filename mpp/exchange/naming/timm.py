"""timm's own names, which MAE, DINO, DeiT, lightly (with timm's ViT), solo-learn and others also use."""

from mpp.exchange.naming_rules import Trained, rule

RULES = (rule(r"(.+)", "{0}"),)
TRAINED = (
    Trained("MAE", (r"(^|\.)decoder_embed\.weight$", r"(^|\.)decoder_blocks\."), masked=True),
    # ConvNeXt and ConvNeXt V2 (Liu et al. 2022, Woo et al. 2023), whose names timm's checkpoint filter translates
    Trained("ConvNeXt", (r"(^|\.)downsample_layers\.0\.0\.weight$",)),
)
