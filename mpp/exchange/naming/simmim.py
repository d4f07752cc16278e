"""Names of SimMIM's published models (Xie et al. 2022): ViTs as in BEiT, Swin as in Microsoft's original Swin.

In pretraining, all blocks of SimMIM's ViT share one table of relative positions. In fine-tuning each block gets a copy,
as in timm's BEiT. A Swin stage ends with the patch merging with which timm's next stage begins.
"""

import re

from mpp.exchange.naming_rules import Trained, rule


def _stage_before(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) - 1}.downsample.{match[2]}"


TABLE = r"(^|\.)rel_pos_bias\.relative_position_bias_table$"
TRAINED = (
    Trained("SimMIM", (TABLE, r"(^|\.)decoder\.0\.weight$"), masked=True),
    # data2vec (Baevski et al. 2022) predicts features as wide as its own. BEiT (Bao et al. 2022) predicts 8192 classes.
    # BEiT's published weights were trained on ImageNet-22k with mean and std 0.5, but weights of its recipe for
    # ImageNet-1k with ImageNet's mean and std.
    Trained("data2vec", (TABLE,), square=r"(^|\.)lm_head\.weight$", masked=True),
    Trained("BEiT", (TABLE,), mean_std=None, masked=True),
    Trained("Swin"),
)
RULES = (
    rule(r"layers\.(\d+)\.downsample\.(.+)", _stage_before),
    rule(
        r"blocks\.(\d+)\.attn\.relative_position_bias_table",
        "blocks.{0}.attn.relative_position_bias_table",
        "rel_pos_bias.relative_position_bias_table",
    ),
    rule(r"(?!layers\.\d+\.downsample\.|blocks\.\d+\.attn\.relative_position_bias_table)(.+)", "{0}"),
)
