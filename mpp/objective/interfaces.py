"""The interfaces of an objective's components, and the words and shapes that every docstring uses.

Shape legend:

    B  images in a batch          C  channels            H, W   image height and width in pixels
    M  masks of an image          With several, corruption, encoder and head get B·M images, each image M times
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
from mpp.objective.grid import count_hidden


class Mask:
    """Base class of masks (`masks/*.py`), which choose the units of an image to hide."""

    unit_px: int | None
    """Side of a mask unit in pixels. None means the encoder's stride."""
    ratio: float | tuple[float, float]
    """Fraction of the units to hide, or its range. A mask without a ratio overrides `count`."""

    def count(self, grid: tuple[int, int], draw: float) -> int:
        """Return how many units to hide in every image of a batch.

        Args:
            grid: Grid of mask units (uh, uw).
            draw: Random number of the batch in [0, 1), which chooses the fraction from a range.
        """
        return count_hidden(grid[0] * grid[1], self.ratio, draw)

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw one mask, (uh, uw) bool, with `count` units hidden."""
        raise NotImplementedError

    def draw_several(self, grid: tuple[int, int], count: int, masks: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the masks of one image, (masks, uh, uw) bool. Masks that depend on each other override this."""
        return np.stack([self(grid, count, rng) for _ in range(masks)])

    def guide(self, teacher: Callable[..., FrozenTeacher]) -> nn.Module | None:
        """Return a module that makes the masks on the model's device, or None if the dataloader's masks are used.

        The module takes (images, noise of the plane "guide", count). The noise is that of B·M masks.
        """
        return None


class CorruptionContext(NamedTuple):
    """Values that the toolkit passes to a corruption."""

    dim: int
    """Width of the encoder's stem; 0 if it has none."""
    channels: int
    unit_px: int


class Corruption(nn.Module):
    """Base class of corruptions (`corruptions/*.py`), which decide what the encoder sees at hidden units.

    A corruption is built with a `CorruptionContext`.
    """

    mechanism: ClassVar[Literal["token", "pixel", "drop"]]
    """How units are hidden. token: by mask tokens, at the stem or from a later block on. pixel: by changed pixels only.
    drop: hidden cells do not enter the encoder."""
    hidden_enter: ClassVar[bool]
    """Whether hidden cells have tokens in the encoder's output."""
    enter: int = 0
    """Block at whose input mask tokens join the visible ones. 0 means at the stem."""

    def forward(self, images: Images, units: Units) -> Corrupted:
        raise NotImplementedError

    def kept(self, units: Units) -> Tensor | None:
        """Return the hidden units whose own pixels the encoder sees, (B, uh, uw) bool, or None if there are none."""
        return None


class TargetContext(NamedTuple):
    """Values that the toolkit passes to a target."""

    channels: int
    cell_px: int
    grid: tuple[int, int]
    """Grid of cells (gh, gw)."""
    teacher: Callable[..., FrozenTeacher]
    """Function that opens a frozen timm model or export: teacher(name=…, pretrained=…, args=…, layers=…). See
    `encoders.teacher.frozen_teacher`."""
    student: Callable[..., FrozenTeacher]
    """Function that copies the encoder, with its initial weights, and freezes the copy:
    student(layers=…, norm_average=…)."""


class Target(nn.Module):
    """Base class of targets (`targets/*.py`): what is predicted at a cell. A target is built with a `TargetContext`."""

    of: ClassVar[Literal["values", "classes", "probabilities"]]
    """Kind of target. values: `dim` numbers. classes: dim / `classes` class numbers, each predicted by `classes`
    logits. probabilities: those of `dim` classes, predicted by `dim` logits."""
    may_collapse: ClassVar[bool] = False
    """Whether the rank of the target's values is logged, because all images may get the same values."""
    compares_images: ClassVar[bool] = False
    """Whether the values of an image depend on the other images of its micro-batch."""
    dim: int
    """Width of a prediction of one cell."""
    classes: int = 0
    """Number of classes, if `of` is "classes"."""

    def forward(self, images: Images) -> Tensor:
        """Return the target of every cell, (B, N, dim) float32, or (B, N, dim / classes) int64."""
        raise NotImplementedError

    def at(self, images: Images, cells: Tensor) -> Tensor:
        """Return the target of the cells (B, P) int64 only. Targets that can compute only some cells override this.

        If images have several masks, the cells of all of them are in one row, where a cell may occur more than once.
        """
        return gather_cells(self(images), cells)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return a prediction that uses no image structure, (B, N, dim). Skill is measured against it."""
        raise NotImplementedError

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        """Draw predictions as images, or return None if this target has no picture.

        Args:
            prediction: Predictions, (B, N, dim).
            images: Images that were predicted.
            hidden: Hidden cells, (B, gh, gw) bool.
            borrow: Whether to use statistics of the hidden pixels themselves. The picture must then be labelled so.

        Returns:
            (B, C, H, W) normalised pixels.
        """
        return None

    def glyphs(self, values: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Draw values (B, N, dim) that are not pixels as (B, 1, k·H, k·W) in [0, 1], or return None for no glyphs."""
        return None

    def after_step(self, encoder: nn.Module, step: int, total_steps: int, made: Tensor) -> None:
        """Follow the encoder after an optimizer step.

        Args:
            encoder: Encoder that is trained.
            step: Number of the step, from 1.
            total_steps: Number of steps in the run.
            made: Whether the step was made, () bool. If it is False, the target must not change. The value stays on
                the device, because reading it would wait for the step.
        """


class Loss:
    """Base class of losses (`losses/*.py`), which compare predictions with targets."""

    of: ClassVar[Literal["values", "classes", "probabilities"]]
    """Kind of target that the loss accepts."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over predicted cells in float32, from predictions (B, P, dim) and their targets."""
        raise NotImplementedError


class Head(nn.Module):
    """Base class of heads (`heads/*.py`), which predict targets from the encoder's tokens.

    A head is built with `encoder_dim`, `out_dim` and the corruption's `hidden_enter`. The constructor raises ValueError
    if the head does not support these values.
    """

    needs_hidden_tokens: ClassVar[bool]
    """Whether the head reads the encoder's tokens at hidden cells. Not every corruption makes these tokens."""
    reads_visible: ClassVar[bool]
    """Whether the head reads tokens of visible cells. If no head does, the last block leaves them out."""

    def forward(self, features: EncoderOutput) -> Tensor:
        """Return predictions (B, P, out_dim) for the predicted cells, in the order of the cells."""
        raise NotImplementedError
