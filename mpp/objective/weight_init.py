"""Weight initialisations of published code that differ from torch's or timm's."""

from __future__ import annotations

import torch
from torch import nn

from mpp.encoders.timm_model import TimmModel
from mpp.objective.grid import sincos_positions

TOKEN_STD = 0.02
"""Standard deviation of class and mask tokens (MAE, He et al. 2022, published code)."""


def init_linear_layers(module: nn.Module) -> None:
    """Draw the weights of every linear layer from Xavier's uniform distribution, and set the biases to zero.

    Source: MAE, He et al. 2022, A.1. Query, key and value of an attention count as one layer, as in MAE's published
    code. Norms are left unchanged.
    """
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            nn.init.xavier_uniform_(part.in_proj_weight)
            nn.init.zeros_(part.in_proj_bias)
        elif isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def init_as_mae(model: TimmModel, grid: tuple[int, int]) -> None:
    """Initialise a timm ViT like MAE's encoder (He et al. 2022, A.1 and published code).

    * Linear layers and the patch embedding: Xavier's uniform distribution.
    * Class and register tokens: N(0, 0.02²).
    * Positions: fixed sines and cosines, zero for the class token. They get no gradient.

    Args:
        model: Plain `VisionTransformer`, with or without a class token.
        grid: Grid of patches of an image, (gh, gw).

    Raises:
        ValueError: If the model is not a plain ViT with a position for each patch.
    """
    positions = getattr(model, "pos_embed", None)
    cells = grid[0] * grid[1]
    kind = type(model).__name__
    if (
        kind != "VisionTransformer"
        or positions is None
        or positions.shape[1]
        not in (
            cells,
            cells + model.num_prefix_tokens,
        )
    ):
        raise ValueError(f"mae is for plain ViTs with a position for each patch; got {kind}")
    init_linear_layers(model)
    projection = model.patch_embed.proj.weight if hasattr(model.patch_embed, "proj") else None
    if projection is not None:
        nn.init.xavier_uniform_(projection.view(len(projection), -1))
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=TOKEN_STD)
    with torch.no_grad():
        positions.zero_()
        positions[0, -cells:] = sincos_positions(grid, positions.shape[2])
    positions.requires_grad_(False)
