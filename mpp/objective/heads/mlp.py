"""Two linear layers with a GELU between them (SimMIM, Xie et al. 2022, table 4, the 2-layer MLP)."""

from __future__ import annotations

from torch import Tensor, nn

from mpp.encoders.cells import EncoderOutput
from mpp.objective.interfaces import Head
from mpp.recipe.values import PositiveInt


class MlpHead(Head):
    """Predict each cell with a LayerNorm and two linear layers with a GELU between them.

    Args:
        hidden_dim: Width of the hidden layer. Default: the encoder's width.
    """

    needs_hidden_tokens = True
    reads_visible = False

    def __init__(
        self, encoder_dim: int, out_dim: int, hidden_enter: bool, *, hidden_dim: PositiveInt | None = None
    ) -> None:
        super().__init__()
        hidden = hidden_dim or encoder_dim
        self.layers = nn.Sequential(
            nn.LayerNorm(encoder_dim), nn.Linear(encoder_dim, hidden), nn.GELU(), nn.Linear(hidden, out_dim)
        )

    def forward(self, features: EncoderOutput) -> Tensor:
        tokens = features.predicted()
        assert tokens is not None, "the model checked it"
        return self.layers(tokens)
