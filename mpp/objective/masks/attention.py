"""Units that a teacher attends to are hidden first (AttMask, Kakogeorgiou et al. 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mpp.data.batch import Images
from mpp.encoders.teacher import FrozenTeacher
from mpp.objective.grid import lowest
from mpp.objective.interfaces import Mask
from mpp.recipe.values import Bool, NonNegativeFloat, PositiveInt, Ratio, TimmArgs


class AttentionMask(Mask):
    """Hide random units, preferably those that a teacher attends to most (AttMask, Kakogeorgiou et al. 2022).

    The mask is drawn on the model's device and not in the dataloader. A hidden unit reveals to the encoder that the
    teacher attends to it, and nothing else.

    Args:
        ratio: Fraction of the units to hide (AttMask: 0.1 to 0.5). A range [a, b] is drawn for each batch.
        teacher: Name of a plain timm ViT, or the folder of a run or an export.
        pretrained: Load timm's published weights into the teacher.
        args: Arguments of timm's constructor for the teacher.
        strength: Exponent of the attention. Units are drawn without replacement, with probability proportional to
            attention^strength. 0 is uniform. A large number hides the most attended units, as AttMask does. The default
            is a guess.
        unit_px: Side of a mask unit in pixels. Default: the encoder's stride.
    """

    def __init__(
        self,
        *,
        ratio: Ratio = 0.4,
        teacher: str = "vit_small_patch16_224.dino",
        pretrained: Bool = True,
        args: TimmArgs = {},  # noqa: B006 (never changed)
        strength: NonNegativeFloat = 1.0,
        unit_px: PositiveInt | None = None,
    ) -> None:
        self.ratio, self.unit_px = ratio, unit_px
        self.teacher, self.pretrained, self.args, self.strength = teacher, pretrained, args, strength

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw a uniform mask, which the guide replaces."""
        mask = np.zeros(grid[0] * grid[1], dtype=bool)
        mask[rng.permutation(mask.size)[:count]] = True
        return mask.reshape(grid)

    def guide(self, teacher: Callable[..., FrozenTeacher]) -> nn.Module:
        """Return the `AttentionGuide` that makes the masks."""
        model = teacher(name=self.teacher, pretrained=self.pretrained, args=self.args)
        model.check_attention()
        return AttentionGuide(model, self.strength)


class AttentionGuide(nn.Module):
    """Sampler of masks by weighted sampling without replacement (Gumbel trick). Each sample has its own noise."""

    def __init__(self, teacher: FrozenTeacher, strength: float) -> None:
        super().__init__()
        self.teacher, self.strength = teacher, strength

    @torch.no_grad()
    def forward(self, images: Images, noise: Tensor, count: int) -> Tensor:
        """Choose the units to hide, with weights from the teacher's attention.

        Args:
            images: Images of the batch.
            noise: Random numbers in [0, 1), (B·M, uh, uw).
            count: Number of units to hide in each mask.

        Returns:
            Hidden units, (B·M, uh, uw) bool.
        """
        attention = self.teacher.attention(images, (noise.shape[1], noise.shape[2]))
        attention = attention.repeat_interleave(len(noise) // len(attention), 0).view(noise.shape)
        gumbel = -(-noise.clamp(1e-7, 1 - 1e-7).log()).log()
        return lowest(-(self.strength * attention.clamp_min(1e-12).log() + gumbel), count)
