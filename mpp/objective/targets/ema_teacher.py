"""Features of a teacher that is the moving average of the encoder itself (data2vec, Baevski et al. 2022).

This is also the target of I-JEPA (Assran et al. 2023), which uses only the last block: `layers: 1`.
"""

from __future__ import annotations

from torch import Tensor

from mpp.data.batch import Images
from mpp.objective.interfaces import TargetContext
from mpp.objective.moving_teacher import MovingTeacherTarget
from mpp.recipe.values import Bool, Fraction, PositiveInt


class EmaTeacherTarget(MovingTeacherTarget):
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

    def __init__(
        self,
        context: TargetContext,
        *,
        layers: PositiveInt = 1,
        norm_average: Bool = False,
        decay: Fraction = 0.996,
        decay_end: Fraction = 1.0,
    ) -> None:
        super().__init__(context, layers=layers, norm_average=norm_average, decay=decay, decay_end=decay_end)
        self.dim = self.teacher.dim

    def forward(self, images: Images) -> Tensor:
        return self.teacher(images, self.grid)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the mean feature of each cell over all images, a prediction that does not depend on the image."""
        values = self(images)
        return values.mean(0, keepdim=True).expand_as(values)
