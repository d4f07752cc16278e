"""The interface of a labeled task, `tasks/*.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from mpp.data.labeled_sets import Images, Labels

Outputs: TypeAlias = Any
"""What a task makes of features: logits, or losses and boxes by name."""
Judged: TypeAlias = Any
"""What a task's metrics need of a batch."""


class Task(nn.Module):
    """A labeled task of fine-tuning, put on an encoder.

    Built with (features, classes): the width of the encoder's vector, or its `FeatureMaps`, and the number of classes.
    """

    labels: ClassVar[str]
    """The kind of label that it learns from, a file in `labels/`."""
    headline: ClassVar[str]
    """The metric of the verdict, in [0, 1]."""
    class_weights: Tensor | None
    """(classes,) by which the loss weighs classes; None: all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("class_weights", None, persistent=False)

    def weigh(self, counts: Tensor) -> None:
        """Let classes count as if all were as frequent: weights go with 1 / counts, (classes,), and their mean over
        what was counted is 1."""
        self.class_weights = counts.sum() / (counts.gt(0).sum() * counts.clamp_min(1))

    def forward(self, *features: Any, **more: Any) -> Outputs:
        """Return outputs.

        Args:
            features: (B, D) alone. For labels at every place a list of maps, (B, D_i, h_i, w_i), then the images' size
                (H, W), for which maps may be too large, and in training the batch's labels.
            more: Nothing.
        """
        raise NotImplementedError

    def loss(self, outputs: Outputs, targets: Labels) -> Tensor:
        """Return a scalar in float32."""
        raise NotImplementedError

    def judge(self, run: Callable[[Tensor], Outputs], images: Images, targets: Labels, size: tuple[int, int]) -> Judged:
        """Return what the metrics need of a batch, on the CPU.

        Args:
            run: Gives outputs for (B, C, H, W) uint8 of the recipe's `size`.
            images: Of a batch. Only what is given to `run` must have that size.
            targets: The batch's labels.
            size: (H, W) in pixels.
        """
        raise NotImplementedError

    def metrics(self, judged: list[Judged], *, headline_only: bool = False) -> dict[str, float]:
        """Return metrics from what `judge` gave for the batches of all validation images."""
        raise NotImplementedError

    def per_class(self, judged: list[Judged]) -> Tensor | None:
        """Return the headline metric of each class, (classes,), nan for a class without one; None: not known by class.

        Args:
            judged: As `metrics` takes it.
        """
        return None
