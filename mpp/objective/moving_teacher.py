"""The base of targets whose teacher is a moving average of the encoder itself."""

from __future__ import annotations

from torch import Tensor, nn

from mpp.objective.interfaces import Target, TargetContext
from mpp.training.moving_average import average


class MovingTeacherTarget(Target):
    """A target with a copy of the encoder that moves towards the encoder after every step. No gradient goes into it.

    Args:
        context: Values from the toolkit.
        layers: Number of last blocks of the copy to average.
        norm_average: Whether to layer-norm the average once more.
        decay: Decay of the moving average at the first step.
        decay_end: Decay at the last step. The decay changes linearly in between.

    Raises:
        ValueError: If the copy would not move, or the decay would fall.
    """

    may_collapse = True

    def __init__(
        self, context: TargetContext, *, layers: int, norm_average: bool = False, decay: float, decay_end: float
    ) -> None:
        super().__init__()
        if decay_end < decay:
            raise ValueError(f"decay_end: must be no less than decay, {decay}; got {decay_end}")
        if decay == 1:
            raise ValueError("decay: must be < 1; at 1 the copy would stay as it starts")
        self.grid, self.decay, self.decay_end = context.grid, decay, decay_end
        self.teacher = context.student(layers=layers, norm_average=norm_average)

    def after_step(self, encoder: nn.Module, step: int, total_steps: int, made: Tensor) -> None:
        """Move the copy towards the encoder. `step` counts from 1. Buffers (batch statistics) are copied."""
        decay = self.decay + (self.decay_end - self.decay) * (step - 1) / max(total_steps - 1, 1)
        current: nn.Module = encoder.model  # type: ignore[assignment]
        average(self.teacher.model, current, decay, only_if=made)
