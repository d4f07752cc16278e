"""The interface of the labeled tasks in `tasks/*.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from mpp.data.labeled_sets import Images, Labels

Outputs: TypeAlias = Any
"""Outputs of a task for a batch: logits, losses by name, or boxes of each image."""
Judged: TypeAlias = Any
"""Data of a batch from which a task computes its metrics."""


class Task(nn.Module):
    """A labeled task of fine-tuning: a head on an encoder, its loss and its metrics.

    The constructor takes two positional arguments: the width of the encoder's feature vector, or its `FeatureMaps`, and
    the number of classes.
    """

    labels: ClassVar[str]
    """Kind of label that the task learns from, the name of a file in `labels/`."""
    headline: ClassVar[str]
    """Name of the metric that decides the verdict. Its values are in [0, 1]."""
    class_weights: Tensor | None
    """Weight of each class in the loss, (classes,). None means equal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("class_weights", None, persistent=False)

    def weigh(self, counts: Tensor) -> None:
        """Weigh the classes in the loss as if all were equally frequent.

        Weights are proportional to 1 / counts, and their mean over everything counted is 1.

        Args:
            counts: How often each class occurs, (classes,).
        """
        self.class_weights = counts.sum() / (counts.gt(0).sum() * counts.clamp_min(1))

    def forward(self, *features: Any, **more: Any) -> Outputs:
        """Return the outputs for a batch.

        Args:
            features: Features of the encoder, (B, D). For labels at every place three arguments: a list of feature
                maps, (B, D_i, h_i, w_i); the size of the images, (H, W), which the maps may exceed; and in training the
                labels of the batch, else None.
            more: Not used.
        """
        raise NotImplementedError

    def loss(self, outputs: Outputs, targets: Labels) -> Tensor:
        """Return the loss of a batch, a scalar in float32."""
        raise NotImplementedError

    def judge(self, run: Callable[[Tensor], Outputs], images: Images, targets: Labels, size: tuple[int, int]) -> Judged:
        """Return the data of a batch from which `metrics` are computed, on the CPU.

        Args:
            run: Model that returns outputs for images (B, C, H, W) in [0, 255] with (H, W) = `size`.
            images: Images of the batch. They may have other sizes, but those given to `run` must have `size`.
            targets: Labels of the batch.
            size: Image size of the recipe, (H, W) in pixels.
        """
        raise NotImplementedError

    def metrics(self, judged: list[Judged], *, headline_only: bool = False) -> dict[str, float]:
        """Return the metrics from the results of `judge` for all batches of images.

        Args:
            judged: Results of `judge`, one for each batch.
            headline_only: Whether to compute only the headline metric.
        """
        raise NotImplementedError

    def per_class(self, judged: list[Judged]) -> Tensor | None:
        """Return the headline metric of each class, (classes,), nan for a class without one.

        None if the task has no such metric by class.

        Args:
            judged: Results of `judge`, one for each batch.
        """
        return None
