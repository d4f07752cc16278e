"""Classification where an image may have several labels, or none."""

from __future__ import annotations

import warnings

import torch.nn.functional as F
from torch import Tensor, nn


class MultilabelTask(nn.Module):
    """A linear layer with a sigmoid for each class, its loss and its metrics."""

    several = True
    headline = "map"

    def __init__(self, features_dim: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = None
        self.out = nn.Linear(features_dim, num_classes)
        nn.init.trunc_normal_(self.out.weight, std=2e-5)  # MAE's and BEiT's fine-tuning: start near zero
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, classes) logits."""
        return self.out(features)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """labels: (B, classes) float32, 0 or 1."""
        return F.binary_cross_entropy_with_logits(logits.float(), labels)

    def metrics(self, logits: Tensor, labels: Tensor, *, headline_only: bool = False) -> dict[str, float]:
        """(n, classes) float32 each, of all validation images -> the metrics, none of which has a threshold.

        map: mean average precision of the classes that occur. auroc: of those that also do not always occur.
        ece: calibration error of the probabilities of all classes, in 15 bins (Guo et al. 2017).
        """
        from torchmetrics.functional import classification as found  # a second, and only here

        classes, truth, probabilities = logits.shape[1], labels.long(), logits.float().sigmoid()
        occurs, lacks = truth.bool().any(0), (1 - truth).bool().any(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchmetrics', of classes that never occur
            precision = found.multilabel_average_precision(probabilities, truth, classes, average="none")
            headline = {"map": float(precision[occurs].double().mean()) if bool(occurs.any()) else 0.0}
            if headline_only:
                return headline
            auroc = found.multilabel_auroc(probabilities, truth, classes, average="none")
        both = occurs & lacks
        return {
            **headline,
            **({"auroc": float(auroc[both].double().mean())} if bool(both.any()) else {}),
            "ece": float(found.binary_calibration_error(probabilities.flatten(), truth.flatten(), n_bins=15)),
        }
