"""The last transformer block, computed only where it is read: queries and MLP of those tokens, keys and values of all.

Exact, and a twentieth cheaper for a ViT whose mask tokens join late (recipes/LOG.md). Whether it is exact for a model's
block is asked of the block, by a probe, so that a block which does something more is simply run whole.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE_TOKENS = 5
TOLERANCE = 1e-9
"""Of a comparison in float64."""


def run_for(block: Any, tokens: Tensor, read: Tensor) -> Tensor:
    """Output of a pre-norm block at some of its tokens.

    tokens: (B, N, D). read: (B, Q, D), the tokens among them that are asked for. AttributeError or another error where
    the block is not made of `norm1`, `attn` with one `qkv` matrix, `norm2` and `mlp`, as timm's plain ones are.
    """
    attn = block.attn
    normed, asked = block.norm1(tokens), block.norm1(read)
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias

    def heads(x: Tensor, parts: slice) -> Tensor:
        rows = slice(parts.start * width, parts.stop * width)
        made = F.linear(x, weight[rows], None if bias is None else bias[rows])
        return made.unflatten(2, (parts.stop - parts.start, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)

    query = attn.q_norm(heads(asked, slice(0, 1))[0])
    key, value = heads(normed, slice(1, 3)).unbind(0)
    dropout = attn.attn_drop.p if attn.training else 0.0
    attended = F.scaled_dot_product_attention(query, attn.k_norm(key), value, dropout_p=dropout)
    attended = attn.norm(attended.transpose(1, 2).flatten(2))
    read = read + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attended))))
    return read + block.drop_path2(block.ls2(block.mlp(block.norm2(read))))


@torch.no_grad()
def runs_for(block: nn.Module) -> bool:
    """Whether `run_for` gives what the block gives, tried on a copy with random weights.

    Leaves torch's generator as it was.
    """
    probe = copy.deepcopy(block).double().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():  # fresh ones may be zero, or scale a branch to nothing
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    width = next((p.shape[0] for p in probe.parameters() if p.ndim == 1), 0)
    tokens = torch.randn(2, PROBE_TOKENS, width, generator=generator, dtype=torch.float64)
    try:
        whole, part = probe(tokens)[:, 2:4], run_for(probe, tokens, tokens[:, 2:4])
    except Exception:  # whatever another kind of block raises
        return False
    return whole.shape == part.shape and bool(((whole - part).abs() <= TOLERANCE * whole.abs().max()).all())
