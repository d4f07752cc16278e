"""Names of OpenMMLab's mmpretrain, mmselfsup and mmcls: VisionTransformer, BEiTViT and SwinTransformer.

Their Swin merges the patches of a 2×2 square with torch's unfold, in the order (channels, rows, columns). timm's order
is (columns, rows, channels).
"""

import re

from torch import Tensor

from mpp.exchange.naming_rules import Trained, rule


def _merged(value: Tensor) -> Tensor:
    """Reorder the last dimension from (channels, rows, columns) to (columns, rows, channels) of a 2×2 square."""
    cut = value.unflatten(-1, (-1, 2, 2))
    return cut.movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3)


def _stage_before(match: re.Match[str]) -> str:
    return f"stages.{int(match[1]) - 1}.downsample.{match[2]}"


TRAINED = (Trained("mmpretrain's MAE and SimMIM", (r"^(state_dict\.)?neck\.decoder",), masked=True),)
BLOCK = r"blocks\.(\d+)\."
STAGE = r"layers\.(\d+)\.blocks\.(\d+)\."
RULES = (
    rule(r"(cls_token|dist_token|pos_embed|mask_token)", "{0}"),
    rule(r"patch_embed\.proj\.(.+)", "patch_embed.projection.{0}"),
    rule(r"patch_embed\.norm\.(.+)", "patch_embed.norm.{0}"),
    rule(BLOCK + r"norm([12])\.(.+)", "layers.{0}.ln{1}.{2}", "layers.{0}.norm{1}.{2}"),
    rule(BLOCK + r"(attn\..+)", "layers.{0}.{1}"),
    rule(BLOCK + r"mlp\.fc1\.(.+)", "layers.{0}.ffn.layers.0.0.{1}"),
    rule(BLOCK + r"mlp\.fc2\.(.+)", "layers.{0}.ffn.layers.1.{1}"),
    rule(BLOCK + r"(gamma_[12])", "layers.{0}.{1}"),
    rule(BLOCK + r"ls1\.gamma", "layers.{0}.attn.gamma1.weight"),
    rule(BLOCK + r"ls2\.gamma", "layers.{0}.ffn.gamma2.weight"),
    rule(BLOCK + r"attn\.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"),
    rule(r"norm\.(.+)", "ln1.{0}", "norm1.{0}", "norm3.{0}"),
    rule(r"fc_norm\.(.+)", "ln2.{0}"),
    rule(STAGE + r"norm([12])\.(.+)", "stages.{0}.blocks.{1}.norm{2}.{3}"),
    rule(STAGE + r"attn\.(.+)", "stages.{0}.blocks.{1}.attn.w_msa.{2}"),
    rule(STAGE + r"mlp\.fc1\.(.+)", "stages.{0}.blocks.{1}.ffn.layers.0.0.{2}"),
    rule(STAGE + r"mlp\.fc2\.(.+)", "stages.{0}.blocks.{1}.ffn.layers.1.{2}"),
    rule(r"layers\.(\d+)\.downsample\.(.+)", _stage_before, change=_merged),
)
