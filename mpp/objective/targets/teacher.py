"""Features of a frozen teacher that sees the whole image (MVP, Wei et al. 2022; EVA, Fang et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from mpp.data.batch import Images
from mpp.objective.interfaces import Target, TargetContext
from mpp.recipe.values import Bool, PositiveInt, TimmArgs


class TeacherTarget(Target):
    """Predict a teacher's patch features, each layer-normed without affine, at the cells of this encoder.

    The teacher's images are resized so that it has as many cells as this encoder. They are normalised with the
    teacher's own mean and std.

    Args:
        teacher: Name of any timm model, or the folder of a run or an export, which comes with its weights.
        pretrained: Load timm's published weights into the teacher.
        args: Arguments of timm's constructor for the teacher.
        layers: Number of last blocks to average, after normalising each (data2vec, Baevski et al. 2022, section 3.3).
    """

    of = "values"

    def __init__(
        self,
        context: TargetContext,
        *,
        teacher: str = "vit_base_patch16_224.dino",
        pretrained: Bool = True,
        args: TimmArgs = {},  # noqa: B006 (never changed)
        layers: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.grid = context.grid
        self.teacher = context.teacher(name=teacher, pretrained=pretrained, args=args, layers=layers)
        self.dim = self.teacher.dim

    def forward(self, images: Images) -> Tensor:
        return self.teacher(images, self.grid)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the mean feature of each cell over all images, a prediction that does not depend on the image."""
        values = self(images)
        return values.mean(0, keepdim=True).expand_as(values)
