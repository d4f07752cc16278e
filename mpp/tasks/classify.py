"""Classification: one label an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.types import Fraction, PositiveInt


class ClassifyTask(nn.Module):
    """The head that is put on the encoder's features, its loss and its count of correct answers.

    `label_smoothing`: Szegedy et al. 2016, section 7. `tanh_dim`: width of a tanh hidden layer before the
    linear one (ViT, Dosovitskiy et al. 2021, section 3.1, their head in pretraining); None: linear alone.
    """

    def __init__(
        self,
        features_dim: int,
        num_classes: int,
        *,
        label_smoothing: Fraction = 0.0,
        tanh_dim: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.hidden = nn.Linear(features_dim, tanh_dim) if tanh_dim else None
        self.out = nn.Linear(tanh_dim or features_dim, num_classes)
        nn.init.trunc_normal_(self.out.weight, std=2e-5)  # MAE's and BEiT's fine-tuning: start near zero
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, classes) logits."""
        if self.hidden is not None:
            features = torch.tanh(self.hidden(features))
        return self.out(features)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """labels: (B,) int64, or (B, classes) float where images were mixed."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) bool."""
        return logits.argmax(-1) == labels
