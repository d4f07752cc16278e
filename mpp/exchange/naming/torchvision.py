"""Names of torchvision's VisionTransformer, which lightly also wraps."""

from mpp.exchange.naming_rules import Trained, rule

TRAINED = (Trained("torchvision"),)
LAYER = "encoder.layers.encoder_layer_{0}"
BLOCK = r"blocks\.(\d+)\."
RULES = (
    rule(r"cls_token", "class_token"),
    rule(r"pos_embed", "encoder.pos_embedding"),
    rule(r"patch_embed\.proj\.(.+)", "conv_proj.{0}"),
    rule(BLOCK + r"norm([12])\.(.+)", LAYER + ".ln_{1}.{2}"),
    rule(BLOCK + r"attn\.qkv\.(.+)", LAYER + ".self_attention.in_proj_{1}"),
    rule(BLOCK + r"attn\.proj\.(.+)", LAYER + ".self_attention.out_proj.{1}"),
    rule(BLOCK + r"mlp\.fc1\.(.+)", LAYER + ".mlp.0.{1}", LAYER + ".mlp.linear_1.{1}"),
    rule(BLOCK + r"mlp\.fc2\.(.+)", LAYER + ".mlp.3.{1}", LAYER + ".mlp.linear_2.{1}"),
    rule(r"norm\.(.+)", "encoder.ln.{0}"),
)
