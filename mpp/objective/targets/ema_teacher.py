"""Features of a teacher that is the moving average of the encoder itself (data2vec, Baevski et al. 2022).

This is also the target of I-JEPA (Assran et al. 2023), which uses only the last block: `layers: 1`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpp.data.batch import Images
from mpp.objective.interfaces import Target, TargetContext
from mpp.parallel.sharding import own_part
from mpp.recipe.values import Bool, Fraction, PositiveInt


class EmaTeacherTarget(Target):
    """Predict the averaged last blocks of a moving average of the encoder, which sees the whole image.

    Three measures help against collapse. Every token of every block is layer-normed before averaging (data2vec, section
    3.3). No gradient goes into the moving average. The log contains the effective rank of the targets (`target_rank`)
    and the share of their energy that depends on the image (`target_share`), with a warning when they fall.

    Skill is measured against a moving target, so it need not rise while the encoder improves.

    Args:
        layers: Number of last blocks to average (data2vec for ViT-B: 6); at most the depth of the encoder.
        norm_average: Layer-norm the average once more, as data2vec's released command does.
        decay: Decay of the moving average at the first step (data2vec for ViT-B: 0.9998; I-JEPA: 0.996).
        decay_end: Decay at the last step (I-JEPA: 1). The decay rises linearly in between.
    """

    of = "values"
    may_collapse = True

    def __init__(
        self,
        context: TargetContext,
        *,
        layers: PositiveInt = 1,
        norm_average: Bool = False,
        decay: Fraction = 0.996,
        decay_end: Fraction = 1.0,
    ) -> None:
        super().__init__()
        if decay_end < decay:
            raise ValueError(f"decay_end: must be no less than decay, {decay}; got {decay_end}")
        if decay == 1:
            raise ValueError("decay: must be < 1; at 1 the copy would stay as it starts")
        self.grid, self.decay, self.decay_end = context.grid, decay, decay_end
        self.teacher = context.student(layers=layers, norm_average=norm_average)
        self.dim = self.teacher.dim

    def forward(self, images: Images) -> Tensor:
        return self.teacher(images, self.grid)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the mean feature of each cell over all images, a prediction that does not depend on the image."""
        values = self(images)
        return values.mean(0, keepdim=True).expand_as(values)

    @torch.no_grad()
    def after_step(self, encoder: nn.Module, step: int, total_steps: int, made: Tensor) -> None:
        """Move the copy towards the encoder. `step` counts from 1. Buffers (batch statistics) are copied."""
        decay = self.decay + (self.decay_end - self.decay) * (step - 1) / max(total_steps - 1, 1)
        theirs: nn.Module = encoder.model  # type: ignore[assignment]
        averaged = self.teacher.model
        copies = [own_part(p) for p in averaged.parameters()]  # a sharded run splits both models alike
        torch._foreach_lerp_(copies, [own_part(p) for p in theirs.parameters()], [(1 - decay) * made] * len(copies))
        for mine, other in zip(averaged.buffers(), theirs.buffers(), strict=True):
            mine.copy_(other)
