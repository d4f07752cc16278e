"""The interfaces of an objective's components, and the words and shapes that every docstring uses.

Shape legend:

    B  images in a batch          C  channels            H, W   image height and width in pixels
    gh, gw  cells of the grid     N  gh·gw               D      width of the encoder's tokens
    uh, uw  mask units            V  visible cells       P      predicted cells (all hidden ones, or a part of them)

**A mask is True where hidden.** Every image of a batch hides the same number of cells. Hidden tokens can therefore be
dropped, and a mean over cells is a mean over images.

Masks are drawn on units of `unit_px` pixels. A cell is what is predicted at once: a mask unit, or a square of the
encoder's output stride if that is smaller. Cells are numbered in raster order, row by row.

A component derives from one of the classes here. Its keyword-only constructor arguments are its recipe keys; the
positional ones come from the toolkit. Methods that only some components need have a default here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from mpp.data.batch import Images, Units
from mpp.encoders.cells import Corrupted, EncoderOutput, gather_cells
from mpp.encoders.teacher import FrozenTeacher


class Mask:
    """Which units of an image are hidden, `masks/*.py`."""

    unit_px: int | None
    """Side of a mask unit in pixels; None: the encoder's stride."""

    def count(self, grid: tuple[int, int], draw: float) -> int:
        """Return how many units to hide in every image of a batch.

        Args:
            grid: Mask units (uh, uw).
            draw: The batch's number in [0, 1), for ratios that vary.
        """
        raise NotImplementedError

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw one mask, (uh, uw) bool, with `count` units hidden."""
        raise NotImplementedError

    def guide(self, teacher: Callable[..., FrozenTeacher]) -> nn.Module | None:
        """Return a module that makes the masks where the model runs, or None if the loader's masks are used.

        The module takes (images, noise of the plane "guide", count).
        """
        return None


class CorruptionContext(NamedTuple):
    """What the toolkit gives a corruption."""

    dim: int
    """Width of the encoder's stem."""
    channels: int
    unit_px: int


class Corruption(nn.Module):
    """What the encoder sees at hidden units, `corruptions/*.py`. Built with a `CorruptionContext`."""

    mechanism: ClassVar[Literal["token", "pixel", "drop"]]
    """token: the mask token at the stem, or joining later; pixel: pixels alone; drop: nothing of hidden cells."""
    hidden_enter: ClassVar[bool]
    """Whether hidden cells have tokens in the encoder's output."""
    enter: int = 0
    """The block at whose input mask tokens join the visible ones; 0: the stem."""

    def forward(self, images: Images, units: Units) -> Corrupted:
        raise NotImplementedError

    def kept(self, units: Units) -> Tensor | None:
        """Return (B, uh, uw) bool, the hidden units whose own pixels the encoder sees; None: there are none."""
        return None


class TargetContext(NamedTuple):
    """What the toolkit gives a target."""

    channels: int
    cell_px: int
    grid: tuple[int, int]
    """Cells of an image."""
    teacher: Callable[..., FrozenTeacher]
    """teacher(name=…, pretrained=…, args=…, layers=…): a frozen timm model or export, `encoders.teacher.Teacher`."""
    student: Callable[..., FrozenTeacher]
    """student(layers=…, norm_average=…): a frozen copy of the encoder that is being trained, as it starts."""


class Target(nn.Module):
    """What is predicted at a cell, `targets/*.py`. Built with a `TargetContext`."""

    of: ClassVar[Literal["values", "classes"]]
    """values: `dim` numbers. classes: dim / `classes` class numbers, each predicted by so many logits."""
    may_collapse: ClassVar[bool] = False
    """Whether the rank of its values is logged, because all images may get the same ones."""
    dim: int
    """Width of a prediction of one cell."""
    classes: int = 0
    """Number of classes, if `of` is "classes"."""

    def forward(self, images: Images) -> Tensor:
        """Return the target of every cell, (B, N, dim) float32, or (B, N, dim / classes) int64."""
        raise NotImplementedError

    def at(self, images: Images, cells: Tensor) -> Tensor:
        """Return the target of the cells (B, P) int64 alone. A target that is quicker so overrides this."""
        return gather_cells(self(images), cells)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the prediction that knows no image structure, (B, N, dim). Skill is measured against it."""
        raise NotImplementedError

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        """Draw predictions as images, or return None if this target has no picture.

        Args:
            prediction: (B, N, dim).
            images: What was predicted.
            hidden: (B, gh, gw) bool.
            borrow: Use statistics of the hidden pixels themselves. A picture made so must say so.

        Returns:
            (B, C, H, W) normalised pixels.
        """
        return None

    def glyphs(self, values: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Draw values (B, N, dim) that are not pixels as (B, 1, k·H, k·W) in [0, 1]; None: they are pixels."""
        return None

    def after_step(self, encoder: nn.Module, step: int, total_steps: int, made: Tensor) -> None:
        """Follow the encoder after an optimizer step.

        Args:
            encoder: The one that is trained.
            step: Steps made so far.
            total_steps: Steps of the run.
            made: () bool. If it is False the step was left out, and the target must not change. The value stays on
                the device: asking for it would wait for the step.
        """


class Loss:
    """How predictions are compared with targets, `losses/*.py`."""

    of: ClassVar[Literal["values", "classes"]]
    """The kind of target it compares with."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over predicted cells in float32, from (B, P, dim) and the target of these cells."""
        raise NotImplementedError


class Head(nn.Module):
    """Predicts targets from the encoder's tokens, `heads/*.py`.

    Built with `encoder_dim`, `out_dim` and the corruption's `hidden_enter`. The constructor raises ValueError if it
    cannot work with these.
    """

    needs_hidden_tokens: ClassVar[bool]
    """Whether it reads the encoder's tokens at hidden cells, which not every corruption makes."""
    reads_visible: ClassVar[bool]
    """Whether it reads tokens of visible cells. If no head does, the last block leaves them out."""

    def forward(self, features: EncoderOutput) -> Tensor:
        """Return (B, P, out_dim) for the predicted cells, in their order."""
        raise NotImplementedError
