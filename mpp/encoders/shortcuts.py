"""Layers computed only for the tokens that are needed: the patch embedding, and the last block.

The embedding is computed for visible cells only. The last block computes queries and MLP for the tokens that a head
reads, but keys and values for all tokens. The results are exact. Together this saves a tenth of a step's time for a ViT
whose mask tokens join late (recipes/LOG.md). A probe checks that the result is exact for a model's layer. A layer that
computes anything else is run for all tokens.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.encoders.cells import gather_cells, patches_at
from mpp.encoders.timm_model import TimmModel

PROBE_TOKENS = 5
TOLERANCE = 1e-9
"""Largest difference that counts as equal in float64, relative to the largest value."""


def run_for(block: TimmModel, tokens: Tensor, read: Tensor) -> Tensor:
    """Compute the output of a pre-norm block for some of its tokens.

    Args:
        block: timm block.
        tokens: All tokens that the block reads, (B, N, D).
        read: Subset of `tokens` for which the output is computed, (B, Q, D).

    Returns:
        Output tokens, (B, Q, D).

    Raises:
        Exception: If the block is not built like timm's plain blocks, from `norm1`, `attn` with one `qkv` matrix,
            `norm2` and `mlp`. Usually this is an AttributeError.
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
    """Return whether `run_for` equals the block, tested on a copy with random weights.

    torch's random generator is left unchanged.
    """
    probe, generator = _random_copy(block)
    width = next((p.shape[0] for p in probe.parameters() if p.ndim == 1), 0)
    tokens = torch.randn(2, PROBE_TOKENS, width, generator=generator, dtype=torch.float64)
    try:
        whole, part = probe(tokens)[:, 2:4], run_for(probe, tokens, tokens[:, 2:4])
    except Exception:  # other kinds of blocks may raise any error
        return False
    return _same(whole, part)


def embed_at(patch_embed: TimmModel, images: Tensor, cells: Tensor) -> Tensor:
    """Embed some patches.

    Args:
        patch_embed: Patch embedding of timm.
        images: Images, (B, C, H, W).
        cells: Patches to embed, (B, V) int64.

    Returns:
        Embedded patches, (B, V, D).

    Raises:
        Exception: If the embedding is not built like timm's plain ones, from a convolution `proj` and a `norm`.
            Usually this is an AttributeError.
    """
    weight = patch_embed.proj.weight
    patches = patches_at(images, weight.shape[-1], cells)
    embedded: Tensor = patch_embed.norm(F.linear(patches, weight.flatten(1), patch_embed.proj.bias))
    return embedded


@torch.no_grad()
def embeds_at(patch_embed: nn.Module, channels: int, image_size: tuple[int, int]) -> bool:
    """Return whether `embed_at` equals the embedding at the same cells, tested on a copy with random weights."""
    probe, generator = _random_copy(patch_embed)
    images = torch.randn(2, channels, *image_size, generator=generator, dtype=torch.float64)
    cells = torch.tensor([[0, 1], [1, 3]])
    try:
        tokens = probe(images)  # (B, N, D), or (B, gh, gw, D)
        whole, part = gather_cells(tokens.flatten(1, -2), cells), embed_at(probe, images, cells)
    except Exception:  # other kinds of stems may raise any error
        return False
    return _same(whole, part)


def _random_copy(module: nn.Module) -> tuple[nn.Module, torch.Generator]:
    """Return a float64 copy of a module with random weights, and the generator that drew them."""
    probe = copy.deepcopy(module).double().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():  # initial weights may be zero, or scale a branch to almost zero
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return probe, generator


def _same(whole: Tensor, part: Tensor) -> bool:
    return whole.shape == part.shape and bool(((whole - part).abs() <= TOLERANCE * whole.abs().max()).all())
