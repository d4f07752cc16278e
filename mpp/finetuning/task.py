"""The interface of a labeled task, `tasks/*.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from torch import Tensor


class Task(Protocol):
    """`tasks/*.py`: a labeled task of fine-tuning, put on an encoder. A module.

    Built with (features, classes): the width of the vector, or the `FeatureMaps`, and the number of classes. It may
    have `per_class(judged)`, (classes,) of the headline metric for each class, nan where it has none.
    """

    labels: Literal["class", "classes", "mask", "boxes"]
    """What an image is labeled with: one class; any number of them; a class at each pixel; boxes with classes."""
    headline: str
    """The metric of the verdict, in [0, 1]."""

    def __call__(self, features: Any, *size_and_targets: Any) -> Any:
        """Outputs from features, (B, D); of a task that reads maps from their list, the images' size (H, W), for which
        maps may be too large, and in training the batch's labels."""
        ...

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Scalar float32."""
        ...

    def judge(self, run: Callable[[Tensor], Any], images: Any, targets: Any, size: tuple[int, int]) -> Any:
        """What the metrics want to know of a batch, on the CPU.

        run: outputs for (B, C, H, W) uint8 of the recipe's `size`; only what it is given of `images` must have it.
        """
        ...

    def metrics(self, judged: list[Any], *, headline_only: bool = False) -> dict[str, float]:
        """From what `judge` gave for the batches of all validation images."""
        ...
