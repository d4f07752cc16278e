"""Which encoder families have passed the contract tests, and what they can do."""

from __future__ import annotations

TRIED = {"VisionTransformer": "plain ViT: vit_*, deit_*, deit3_*, with registers, class token or average pooling"}
"""Class name of the timm model -> what was tried of it."""

FAMILIES_THAT_DROP = frozenset({"VisionTransformer"})
"""Class names whose blocks take any subset of tokens: absolute positions only, added before block 0."""

UNREAD_PREFIXES = ("norm.", "fc_norm.", "head.", "head_dist.", "head_drop.", "attn_pool.")
"""Parameters that come after the last block. Pretraining reads the last block raw, so nothing trains them:
they are frozen (DDP waits for the gradient of every trainable parameter)."""
