"""Classification: one label per image."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.finetuning.task import Task
from mpp.recipe.values import Fraction, PositiveInt


class ClassifyTask(Task):
    """Classify images: the head on the encoder's features, its loss and its metrics.

    Args:
        label_smoothing: Probability moved from the label to all classes, from 0 to 1 (Szegedy et al. 2016, section 7).
        tanh_dim: Width of a hidden layer with tanh before the linear layer (as in the pretraining of ViT, Dosovitskiy
            et al. 2021, section 3.1). Default: only the linear layer.
    """

    labels = "one_class"
    headline = "accuracy"

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
        nn.init.trunc_normal_(self.out.weight, std=2e-5)  # start near zero, as in the fine-tuning of MAE and BEiT
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits: features (B, D) -> (B, classes)."""
        if self.hidden is not None:
            features = torch.tanh(self.hidden(features))
        return self.out(features)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a micro-batch.

        Args:
            logits: Logits, (B, classes).
            labels: Class numbers, (B,) int64. If images were mixed, probabilities, (B, classes) float.
        """
        if self.class_weights is not None and labels.ndim == 1:
            # for class numbers, torch divides by the sum of the weights in the batch; for probabilities it does not
            labels = F.one_hot(labels, logits.shape[1]).float()
        smoothing, weights = self.label_smoothing, self.class_weights
        return F.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=smoothing)

    def judge(
        self, run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return logits, (B, classes) float32, and labels, (B,)."""
        return run(images).float().cpu(), labels

    def metrics(self, judged: list[tuple[Tensor, Tensor]], *, headline_only: bool = False) -> dict[str, float]:
        """Return the metrics, which all work without a threshold.

        accuracy: fraction of images whose likeliest class is the label.
        balanced_accuracy: mean recall of the classes that occur.
        auroc, map: area under the ROC curve and average precision of each class that occurs against the rest, averaged.
        ece: expected calibration error in 15 bins (Guo et al. 2017).
        """
        logits, labels = (torch.cat(t) for t in zip(*judged, strict=True))
        hits = (logits.argmax(-1) == labels).double()
        if headline_only:
            return {"accuracy": float(hits.mean())}
        from torchmetrics.functional import classification as found  # imported here because the import takes a second

        classes, probabilities = logits.shape[1], logits.float().softmax(-1)
        occurring = torch.bincount(labels, minlength=classes).gt(0)
        if int(occurring.sum()) == 1:  # there are no other classes to rank it against
            ranked = {}
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns of classes that never occur
                auroc = found.multiclass_auroc(probabilities, labels, classes, average="none")
                precision = found.multiclass_average_precision(probabilities, labels, classes, average="none")
            ranked = {"auroc": float(auroc[occurring].mean()), "map": float(precision[occurring].mean())}
        recall = torch.stack([hits[labels == c].mean() for c in occurring.nonzero().flatten()])
        return {
            "accuracy": float(hits.mean()),
            "balanced_accuracy": float(recall.mean()),
            **ranked,
            "ece": float(found.multiclass_calibration_error(probabilities, labels, classes, n_bins=15)),
        }
