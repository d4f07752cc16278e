"""One linear layer (SimMIM, Xie et al. 2022, section 3.3: as good as heavier heads)."""

from __future__ import annotations

from torch import Tensor, nn

from mpp.encoders.cells import EncoderOutput
from mpp.objective.interfaces import Head


class LinearHead(Head):
    """Predict each cell with a LayerNorm and a linear layer on the encoder's token."""

    needs_hidden_tokens = True
    reads_visible = False

    def __init__(self, encoder_dim: int, out_dim: int, hidden_enter: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(encoder_dim)
        self.out = nn.Linear(encoder_dim, out_dim)
        nn.init.trunc_normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: EncoderOutput) -> Tensor:
        tokens = features.predicted()
        assert tokens is not None, "the model checked it"
        return self.out(self.norm(tokens))
