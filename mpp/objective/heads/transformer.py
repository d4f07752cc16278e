"""A light transformer over visible tokens and mask tokens (MAE, He et al. 2022, section 3, the decoder)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpp.encoders.cells import EncoderOutput, gather_cells
from mpp.objective.grid import decoder_dim, sincos_positions
from mpp.objective.interfaces import Head
from mpp.objective.weight_init import TOKEN_STD, init_linear_layers
from mpp.recipe.values import Bool, PositiveInt

NORM_EPS = 1e-6
"""Epsilon of the norms, as in MAE's published code."""


class TransformerHead(Head):
    """Decode visible and mask tokens with a small transformer, as MAE does.

    The defaults (half of the encoder's width, one block, 4 heads) are guesses that keep the head light compared with
    small encoders. MAE's own decoder (width 512, 8 blocks, 16 heads) costs 6 to 7 times as much as a CIFAR-sized
    encoder. If hidden cells were already in the encoder (`hidden_enter`), their tokens replace the head's mask token.

    Args:
        dim: Width of the decoder, a multiple of 4 and of num_heads. Default: half of the encoder's width (a guess).
        depth: Number of decoder blocks (a guess; MAE: 8).
        num_heads: Number of attention heads (a guess; MAE: 16).
        prefix_tokens: Let the decoder also read the encoder's class and register tokens, as MAE's does. Without them,
            the class token's last output gets no gradient.
    """

    needs_hidden_tokens = False
    reads_visible = True

    def __init__(
        self,
        encoder_dim: int,
        out_dim: int,
        hidden_enter: bool,
        *,
        dim: PositiveInt | None = None,
        depth: PositiveInt = 1,
        num_heads: PositiveInt = 4,
        prefix_tokens: Bool = True,
    ) -> None:
        super().__init__()
        self.dim = decoder_dim(encoder_dim, dim, num_heads)
        self.prefix_tokens = prefix_tokens
        self.embed = nn.Sequential(nn.LayerNorm(encoder_dim, NORM_EPS), nn.Linear(encoder_dim, self.dim))
        self.mask_token = None if hidden_enter else nn.Parameter(torch.randn(self.dim) * TOKEN_STD)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.dim, num_heads, 4 * self.dim, 0.0, "gelu", NORM_EPS, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(self.dim, NORM_EPS)
        self.out = nn.Linear(self.dim, out_dim)
        init_linear_layers(self)

    def forward(self, features: EncoderOutput) -> Tensor:
        positions = sincos_positions(features.cells.grid, self.dim, features.tokens.device)
        positions = positions.expand(len(features.tokens), -1, -1)
        entered = features.predicted()
        hidden: Tensor = self.mask_token if entered is None else self.embed(entered)  # type: ignore[assignment]
        # class and register tokens have no place in the image, so they get no position
        read = [self.embed(features.prefix)] if self.prefix_tokens and features.prefix is not None else []
        read.append(self.embed(features.visible()) + gather_cells(positions, features.cells.visible))
        read.append(hidden + gather_cells(positions, features.cells.predicted))
        x = torch.cat(read, dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, -features.cells.predicted.shape[1] :]))
