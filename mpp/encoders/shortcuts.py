"""Layers computed only for the tokens that are needed: the patch embedding, and the last block.

Of the embedding visible cells alone; of the last block queries and MLP of the tokens that a head reads, keys and values
of all. Exact, and together a tenth of a step's time for a ViT whose mask tokens join late (recipes/LOG.md). Whether it
is exact for a model's layer is asked of the layer, by a probe: one which does something more is simply run whole.
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
"""Of a comparison in float64."""


def run_for(block: TimmModel, tokens: Tensor, read: Tensor) -> Tensor:
    """Compute a pre-norm block at some of its tokens.

    Args:
        block: Of timm.
        tokens: (B, N, D), all that it reads.
        read: (B, Q, D), those among them at which its output is wanted.

    Returns:
        (B, Q, D).

    Raises:
        Exception: AttributeError or another one, where the block is not made of `norm1`, `attn` with one `qkv` matrix,
            `norm2` and `mlp`, as timm's plain ones are.
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
    probe, generator = _random_copy(block)
    width = next((p.shape[0] for p in probe.parameters() if p.ndim == 1), 0)
    tokens = torch.randn(2, PROBE_TOKENS, width, generator=generator, dtype=torch.float64)
    try:
        whole, part = probe(tokens)[:, 2:4], run_for(probe, tokens, tokens[:, 2:4])
    except Exception:  # whatever another kind of block raises
        return False
    return _same(whole, part)


def embed_at(patch_embed: TimmModel, images: Tensor, cells: Tensor) -> Tensor:
    """Embed some patches.

    Args:
        patch_embed: Of timm.
        images: (B, C, H, W).
        cells: (B, V) int64, the patches that are wanted.

    Returns:
        (B, V, D).

    Raises:
        Exception: AttributeError or another one, where it is not made of a convolution `proj` and a `norm`, as timm's
            plain ones are.
    """
    weight = patch_embed.proj.weight
    patches = patches_at(images, weight.shape[-1], cells)
    embedded: Tensor = patch_embed.norm(F.linear(patches, weight.flatten(1), patch_embed.proj.bias))
    return embedded


@torch.no_grad()
def embeds_at(patch_embed: nn.Module, channels: int, image_size: tuple[int, int]) -> bool:
    """Whether `embed_at` gives what the embedding gives at these cells, tried on a copy with random weights."""
    probe, generator = _random_copy(patch_embed)
    images = torch.randn(2, channels, *image_size, generator=generator, dtype=torch.float64)
    cells = torch.tensor([[0, 1], [1, 3]])
    try:
        tokens = probe(images)  # (B, N, D), or (B, gh, gw, D)
        whole, part = gather_cells(tokens.flatten(1, -2), cells), embed_at(probe, images, cells)
    except Exception:  # whatever another kind of stem raises
        return False
    return _same(whole, part)


def _random_copy(module: nn.Module) -> tuple[nn.Module, torch.Generator]:
    """In float64, and the generator that its weights came from."""
    probe = copy.deepcopy(module).double().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():  # fresh ones may be zero, or scale a branch to nothing
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return probe, generator


def _same(whole: Tensor, part: Tensor) -> bool:
    return whole.shape == part.shape and bool(((whole - part).abs() <= TOLERANCE * whole.abs().max()).all())
