"""Queries at predicted cells attend to the visible tokens, not to each other (CrossMAE, Fu et al. 2024, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpp.encoders.cells import EncoderOutput, gather_cells
from mpp.objective.grid import decoder_dim, sincos_positions
from mpp.objective.interfaces import Head
from mpp.objective.weight_init import TOKEN_STD, init_linear_layers
from mpp.recipe.values import Bool, PositiveInt


class CrossBlock(nn.Module):
    """Block of pre-norm cross-attention and an MLP of 4 times the width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.query_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        attended, _ = self.attention(self.query_norm(queries), context, context, need_weights=False)
        queries = queries + attended
        return queries + self.mlp(self.mlp_norm(queries))


class CrossAttentionHead(Head):
    """Decode the predicted cells only, by cross-attention to the visible tokens (CrossMAE, Fu et al. 2024).

    Its cost grows with the predicted cells only, so a `predict_fraction` below 1 makes it cheaper. CrossMAE also mixes
    features of several encoder layers for each block, which this head does not. This head embeds the visible tokens and
    adds positions to them, which CrossMAE does not.

    Args:
        dim: Width of the decoder, a multiple of 4 and of num_heads. Default: half of the encoder's width (a guess).
        depth: Number of decoder blocks (a guess).
        num_heads: Number of attention heads (a guess).
        prefix_tokens: Let queries also attend to the encoder's class and register tokens, as in CrossMAE.
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
        self.embed = nn.Sequential(nn.LayerNorm(encoder_dim), nn.Linear(encoder_dim, self.dim))
        self.context_norm = nn.LayerNorm(self.dim)
        self.mask_token = None if hidden_enter else nn.Parameter(torch.randn(self.dim) * TOKEN_STD)
        self.blocks = nn.ModuleList(CrossBlock(self.dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(self.dim)
        self.out = nn.Linear(self.dim, out_dim)
        init_linear_layers(self)

    def forward(self, features: EncoderOutput) -> Tensor:
        positions = sincos_positions(features.cells.grid, self.dim, features.tokens.device)
        positions = positions.expand(len(features.tokens), -1, -1)
        context = self.embed(features.visible()) + gather_cells(positions, features.cells.visible)
        # class and register tokens have no place in the image, so they get no position
        if self.prefix_tokens and features.prefix is not None:
            context = torch.cat([self.embed(features.prefix), context], dim=1)
        context = self.context_norm(context)
        entered = features.predicted()
        start: Tensor = self.mask_token if entered is None else self.embed(entered)  # type: ignore[assignment]
        queries = start + gather_cells(positions, features.cells.predicted)
        for block in self.blocks:
            queries = block(queries, context)
        return self.out(self.norm(queries))
