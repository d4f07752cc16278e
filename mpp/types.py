"""Shapes, masks and the interfaces between components.

Shape legend, used in every docstring:

    B  images in a batch          C  channels            H, W   image height and width in pixels
    gh, gw  cells of the grid     N  gh·gw               D      width of the encoder's tokens
    V  visible cells per image    P  predicted cells per image (a part, or all, of the hidden ones)

**A mask is True where hidden.** This is the only place that says so. Every image of a batch hides the same
number of cells, so that hidden tokens can be dropped and means over cells are means over images.

A cell is a square of the encoder's output stride; a mask may be drawn on larger units (`unit_px`) and is
then repeated to cells. Cells are numbered in raster order, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Field, Strict
from torch import Tensor


def no_bool(value: object) -> object:
    """Lax validation would turn `true` into 1."""
    if isinstance(value, bool):
        raise ValueError("true/false is not a number")
    return value


Bool = Annotated[bool, Strict()]
"""`yes` is a string in YAML 1.2 and stays one."""
Int = Annotated[int, BeforeValidator(no_bool)]
Float = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, BeforeValidator(no_bool), Field(ge=1)]
NonNegativeInt = Annotated[int, BeforeValidator(no_bool), Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(no_bool), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(no_bool), Field(ge=0, allow_inf_nan=False)]
OpenFraction = Annotated[float, BeforeValidator(no_bool), Field(gt=0, lt=1)]
"""A number in (0, 1)."""
Fraction = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
"""A number in [0, 1]."""


@dataclass
class Batch:
    """One micro-batch of pretraining, as the loader's workers make it."""

    images: Tensor
    """(B, C, H, W) uint8, cropped and flipped, not normalised."""
    mask: Tensor
    """(B, gh, gw) bool, on mask units."""
    noise: Tensor
    """(B, gh, gw) float32 in [0, 1): whatever else is drawn per mask unit is derived from it."""
    positions: Tensor
    """(B,) int64: place of each sample in the run's endless sequence."""
    samples: Tensor
    """(B, 2) int64: (shard, row) of each sample."""
    hidden_units: int
    """Mask units hidden in each image, a plain int so that no device has to be asked."""
    replaced: int = 0
    """Samples whose image could not be read and was replaced by a neighbour."""
    bad: list[str] = field(default_factory=list)
    """One line for each image that could not be read; a search for a neighbour may meet several."""

    def pin_memory(self) -> Batch:
        for name in ("images", "mask", "noise"):
            setattr(self, name, getattr(self, name).pin_memory())
        return self


@dataclass
class Cells:
    """Which cells of a batch are hidden and which of those are predicted."""

    hidden: Tensor
    """(B, gh, gw) bool."""
    visible: Tensor
    """(B, V) int64, raster numbers, ascending."""
    predicted: Tensor
    """(B, P) int64, raster numbers, ascending; all hidden cells or a part of them."""

    @property
    def grid(self) -> tuple[int, int]:
        return self.hidden.shape[1], self.hidden.shape[2]


@dataclass
class EncoderInput:
    """What a corruption hands to the encoder."""

    images: Tensor
    """(B, C, H, W) float, hidden pixels blanked."""
    cells: Cells
    mask_token: Tensor | None = None
    """(D,) the learnable token that stands at hidden cells; None: hidden cells never enter the encoder."""
    enter: int = 0
    """Encoder block at whose input the mask tokens join; 0: they are there from the stem on."""


@dataclass
class EncoderOutput:
    """Tokens of the encoder's last block, before its final norm, without class or register tokens.

    layout "raster": N tokens, all cells in raster order.
    layout "visible": V tokens. layout "visible+predicted": V tokens, then P.
    """

    tokens: Tensor
    cells: Cells
    layout: Literal["raster", "visible", "visible+predicted"]

    def visible(self) -> Tensor:
        """(B, V, D)"""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.visible)
        return self.tokens[:, : self.cells.visible.shape[1]]

    def predicted(self) -> Tensor | None:
        """(B, P, D), or None where hidden cells never entered the encoder."""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.predicted)
        if self.layout == "visible":
            return None
        return self.tokens[:, self.cells.visible.shape[1] :]


def gather_cells(x: Tensor, cells: Tensor) -> Tensor:
    """(B, N, D) and (B, K) int64 -> (B, K, D)."""
    return x.gather(1, cells.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class MaskSampler(Protocol):
    """`masks/*.py`. Its keyword-only constructor arguments are its recipe keys."""

    unit_px: int | None
    """Side of a mask unit in pixels; None: the encoder's stride."""

    def __call__(self, grid: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """One mask, (gh, gw) bool; the number of hidden cells depends on the grid alone."""
        ...


class Corruption(Protocol):
    """`corruptions/*.py`: what the encoder sees at hidden cells. Built with `dim`, the stem's width."""

    hidden_enter: bool
    """Whether hidden cells have tokens in the encoder's output."""

    def __call__(self, images: Tensor, cells: Cells) -> EncoderInput:
        """(B, C, H, W) float images; which cells are hidden."""
        ...


class Target(Protocol):
    """`targets/*.py`: what is predicted at a cell. Built with `channels` and `cell_px`."""

    dim: int
    """Values predicted for a cell."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised float32 -> (B, N, dim) float32."""
        ...

    def trivial(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, N, dim): the prediction that knows no image structure; skill is measured against it."""
        ...

    def picture(self, values: Tensor, images: Tensor, hidden: Tensor, *, borrow: bool) -> Tensor:
        """(B, N, dim) values -> (B, C, H, W) normalised pixels.

        borrow=True may use statistics of the hidden pixels themselves; a picture made so must say so.
        """
        ...


class Loss(Protocol):
    """`losses/*.py`."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, P, dim) and (B, P, dim) float32, hidden cells only -> scalar mean."""
        ...


class Head(Protocol):
    """`heads/*.py`. Built with `encoder_dim`, `out_dim` and the corruption's `hidden_enter`.

    ValueError from the constructor where it cannot work with these.
    """

    needs_hidden_tokens: bool
    """Whether it reads the encoder's tokens at hidden cells, which not every corruption makes."""

    def __call__(self, features: EncoderOutput) -> Tensor:
        """-> (B, P, out_dim) for the predicted cells, in their order."""
        ...
