"""Classification with several labels an image, or none, by binary cross-entropy (DeiT III, Touvron et al. 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.finetuning.task import Task


class MultilabelTask(Task):
    """A linear layer with a sigmoid for each class, its loss and its metrics."""

    labels = "several_classes"
    headline = "map"

    def __init__(self, features_dim: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = None
        self.out = nn.Linear(features_dim, num_classes)
        nn.init.trunc_normal_(self.out.weight, std=2e-5)  # start near zero, as in the fine-tuning of MAE and BEiT
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits: features (B, D) -> (B, classes)."""
        return self.out(features)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a micro-batch.

        Args:
            logits: Logits, (B, classes).
            labels: Whether an image has each class, (B, classes) float32, 0 or 1.
        """
        return F.binary_cross_entropy_with_logits(logits.float(), labels)

    def judge(
        self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return logits and labels, (B, classes) float32."""
        return run(images).float().cpu(), labels

    def metrics(self, judged: list[tuple[Tensor, Tensor]], *, headline_only: bool = False) -> dict[str, float]:
        """Return the metrics, which all work without a threshold.

        map: mean average precision of the classes that occur.
        auroc: mean area under the ROC curve of the classes that some images have and others lack.
        ece: expected calibration error of the probabilities of all classes, in 15 bins (Guo et al. 2017).
        """
        from torchmetrics.functional import classification as found  # imported here because the import takes a second

        def of_each_class(binary: Callable[..., Tensor]) -> Tensor:
            """Return a binary metric for each class, (classes,)."""
            return torch.stack([binary(p, t) for p, t in zip(probabilities.T, truth.T, strict=True)])

        logits, labels = (torch.cat(t) for t in zip(*judged, strict=True))
        truth, probabilities = labels.long(), logits.float().sigmoid()
        occurs, lacks = truth.bool().any(0), (1 - truth).bool().any(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns of classes that never occur
            precision = of_each_class(found.binary_average_precision)
            headline = {"map": float(precision[occurs].double().mean()) if bool(occurs.any()) else 0.0}
            if headline_only:
                return headline
            auroc = of_each_class(found.binary_auroc)
        both = occurs & lacks
        return {
            **headline,
            **({"auroc": float(auroc[both].double().mean())} if bool(both.any()) else {}),
            "ece": float(found.binary_calibration_error(probabilities.flatten(), truth.flatten(), n_bins=15)),
        }
