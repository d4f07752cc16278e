"""Shapes, masks and the interfaces between components.

Shape legend, used in every docstring:

    B  images in a batch          C  channels            H, W   image height and width in pixels
    gh, gw  cells of the grid     N  gh·gw               D      width of the encoder's tokens
    uh, uw  mask units            V  visible cells       P      predicted cells (a part, or all, of the hidden ones)

**A mask is True where hidden.** This is the only place that says so. Every image of a batch hides the same
number of cells, so that hidden tokens can be dropped and means over cells are means over images.

Masks are drawn on units of `unit_px` pixels. A cell is what is predicted at once: a unit, or a square of the
encoder's output stride where that is smaller. Cells are numbered in raster order, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, Strict, WithJsonSchema
from torch import Tensor


def no_bool(value: object) -> object:
    """Lax validation would turn `true` into 1."""
    if isinstance(value, bool):
        raise ValueError("true/false is not a number")
    return value


def _countable(value: int) -> int:
    """Numbers far above any of use do not fit where they go: a float, an integer of C's."""
    if value > 10**15:
        raise ValueError("must be at most 10^15")
    return value


Bool = Annotated[bool, Strict()]
"""`yes` is a string in YAML 1.2 and stays one."""
Int = Annotated[int, BeforeValidator(no_bool)]
Float = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, BeforeValidator(no_bool), AfterValidator(_countable), Field(ge=1)]
NonNegativeInt = Annotated[int, BeforeValidator(no_bool), AfterValidator(_countable), Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(no_bool), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(no_bool), Field(ge=0, allow_inf_nan=False)]
OpenFraction = Annotated[float, BeforeValidator(no_bool), Field(gt=0, lt=1)]
"""A number in (0, 1)."""
Fraction = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
"""A number in [0, 1]."""
BelowOne = Annotated[float, BeforeValidator(no_bool), Field(ge=0, lt=1)]
"""A number in [0, 1)."""


def _ratio(value: object) -> float | tuple[float, float]:
    ends = value if isinstance(value, list | tuple) else (value, value)
    if len(ends) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in ends):
        raise ValueError("must be one number or [lowest, highest]")
    low, high = ends
    if not 0 < low < 1 or not 0 < high < 1:
        raise ValueError("must be > 0 and < 1")
    if low > high:
        raise ValueError("the lower end comes first")
    return (low, high) if isinstance(value, list | tuple) else low


Aspect = Annotated[float, BeforeValidator(no_bool), Field(ge=1, le=100)]
"""Longer side over shorter side of a block."""
_OPEN = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
Ratio = Annotated[
    float | tuple[float, float],
    PlainValidator(_ratio),
    PlainSerializer(lambda value: value, return_type=Any),
    WithJsonSchema({"anyOf": [_OPEN, {"type": "array", "items": _OPEN, "minItems": 2, "maxItems": 2}]}),
]
"""Part of the mask units that is hidden: a number in (0, 1), or a range from which each batch draws its own."""


@dataclass
class Batch:
    """One micro-batch of pretraining, as the loader's workers make it."""

    images: Tensor
    """(B, C, H, W) uint8, cropped and flipped, not normalised; float32 in [0, 255] for images with a value range."""
    mask: Tensor
    """(B, uh, uw) bool."""
    noise: Tensor
    """(B, 4, uh, uw) float32 in [0, 1), see `NOISE`: whatever else is drawn per mask unit is derived from it."""
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

    def tensors_by(self, act: Callable[[Tensor], Tensor]) -> Batch:
        """What the model computes with, replaced by what `act` makes of it; the rest stays with the host."""
        self.images, self.mask, self.noise = act(self.images), act(self.mask), act(self.noise)
        return self

    def pin_memory(self) -> Batch:
        return self.tensors_by(Tensor.pin_memory)


NOISE = {"predict": 0, "kind": 1, "source": 2, "guide": 3}
"""Planes of `Batch.noise`: which hidden units are predicted, what a corruption does to each, whence it copies,
and what a guided mask adds to its guide."""


class Images(NamedTuple):
    """One batch of images, as targets, corruptions and teachers may want them."""

    raw: Tensor
    """(B, C, H, W) uint8."""
    normalised: Tensor
    """(B, C, H, W) float32, (raw / 255 - mean) / std."""
    mean: Tensor
    """(C, 1, 1) of pixels in [0, 1]."""
    std: Tensor
    """(C, 1, 1)"""


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

    @property
    def some_predicted(self) -> bool:
        """Whether there are cells that are not."""
        return self.predicted.shape[1] < self.hidden[0].numel()


@dataclass
class Units:
    """The mask as it was drawn, for corruptions that treat hidden units differently."""

    hidden: Tensor
    """(B, uh, uw) bool."""
    count: int
    """Hidden units of each image, a plain int."""
    noise: Tensor
    """(B, 4, uh, uw), see `NOISE`."""


@dataclass
class Corrupted:
    """What a corruption makes of a batch, for the encoder."""

    images: Tensor
    """(B, C, H, W) float; nothing of hidden units is left in it, unless the corruption says it keeps some."""
    mask_token: Tensor | None = None
    """(D,) the learnable token that stands at `replaced` cells, or joins; None: the pixels are all there is."""
    replaced: Tensor | None = None
    """(B, uh, uw) bool: units whose stem output the mask token takes the place of."""
    enter: int | None = 0
    """0: hidden cells are in the encoder from its stem on; k: as mask tokens from block k on; None: never."""


@dataclass
class EncoderOutput:
    """Tokens of the encoder's last block, before its final norm; class and register tokens apart, as `prefix`.

    layout "raster": N tokens, all cells in raster order.
    layout "visible": V tokens. layout "visible+predicted": V tokens, then P. layout "predicted": P tokens, which is
    all that is there for heads that read no others.
    """

    tokens: Tensor
    cells: Cells
    layout: Literal["raster", "visible", "visible+predicted", "predicted"]
    prefix: Tensor | None = None
    """(B, K, D): class and register tokens of the last block; None for encoders that have none."""

    def visible(self) -> Tensor:
        """(B, V, D)"""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.visible)
        assert self.layout != "predicted", "a head that reads visible cells has reads_visible = True"
        return self.tokens[:, : self.cells.visible.shape[1]]

    def predicted(self) -> Tensor | None:
        """(B, P, D), or None where hidden cells never entered the encoder."""
        if self.layout == "raster":
            return gather_cells(self.tokens, self.cells.predicted)
        if self.layout == "visible":
            return None
        if self.layout == "predicted":
            return self.tokens
        return self.tokens[:, self.cells.visible.shape[1] :]


def gather_cells(x: Tensor, cells: Tensor) -> Tensor:
    """(B, N, K) and (B, P) int64 -> (B, P, K)."""
    return x.gather(1, cells.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class MaskSampler(Protocol):
    """`masks/*.py`. Its keyword-only constructor arguments are its recipe keys.

    It may have `guide(teacher)`, which gives a module that makes the masks where the model runs, from (images, noise
    of the plane "guide", count), in place of those that the loader drew.
    """

    unit_px: int | None
    """Side of a mask unit in pixels; None: the encoder's stride."""

    def count(self, grid: tuple[int, int], draw: float) -> int:
        """Units to hide in every image of a batch; `draw` in [0, 1) is the batch's, for ratios that vary."""
        ...

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        """One mask, (uh, uw) bool, with `count` units hidden."""
        ...


class Corruption(Protocol):
    """`corruptions/*.py`: what the encoder sees at hidden units. Built with a `CorruptionContext`."""

    mechanism: Literal["token", "pixel", "drop"]
    """token: the mask token at the stem, or joining later; pixel: pixels alone; drop: nothing of hidden cells."""
    hidden_enter: bool
    """Whether hidden cells have tokens in the encoder's output."""

    def __call__(self, images: Images, units: Units) -> Corrupted: ...

    def kept(self, units: Units) -> Tensor | None:
        """(B, uh, uw) bool: hidden units whose own pixels the encoder sees all the same; None: there are none."""
        ...


class CorruptionContext(NamedTuple):
    """What the toolkit gives a corruption."""

    dim: int
    """Width of the encoder's stem."""
    channels: int
    unit_px: int


class Teacher(Protocol):
    """A frozen encoder that sees the whole image, `encoders/teacher.py`."""

    dim: int

    def __call__(self, images: Images, grid: tuple[int, int]) -> Tensor:
        """(B, gh·gw, dim) float32, without gradient."""
        ...


class TargetContext(NamedTuple):
    """What the toolkit gives a target."""

    channels: int
    cell_px: int
    grid: tuple[int, int]
    """Cells of an image."""
    teacher: Callable[..., Any]
    """teacher(name=…, pretrained=…, args=…, layers=…): a frozen timm model or export, see `Teacher`."""
    student: Callable[..., Any]
    """student(layers=…, norm_average=…): a frozen copy of the encoder that is being trained, as it starts."""


class Target(Protocol):
    """`targets/*.py`: what is predicted at a cell. Built with a `TargetContext`; a module.

    Where `of` is "classes" it has `classes`, their number. It may have `at(images, cells)`, which gives what it gives,
    (B, P, dim), for the cells (B, P) int64 alone; `after_step(encoder, step, total_steps, made)`, called after every
    optimizer step, where `made`, () bool, is False of one that was left out: it must then change nothing, and find that
    out without asking the device; `may_collapse = True`, for which the rank of its values is logged; and, where its
    values are no pixels, `glyphs(values, grid)`: (B, N, dim) -> (B, 1, k·H, k·W) in [0, 1], a drawing of them.
    """

    of: Literal["values", "classes"]
    """values: `dim` numbers. classes: dim / classes class numbers, each predicted by so many logits."""
    dim: int
    """Width of a prediction of one cell."""

    def __call__(self, images: Images) -> Tensor:
        """(B, N, dim) float32, or (B, N, dim / classes) int64."""
        ...

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """(B, N, dim): the prediction that knows no image structure; skill is measured against it."""
        ...

    def picture(self, prediction: Tensor, images: Images, hidden: Tensor, *, borrow: bool) -> Tensor | None:
        """(B, N, dim) predictions -> (B, C, H, W) normalised pixels; None: this target has no picture.

        borrow=True may use statistics of the hidden pixels themselves; a picture made so must say so.
        """
        ...


class Loss(Protocol):
    """`losses/*.py`."""

    of: Literal["values", "classes"]
    """What it compares predictions with."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(B, P, dim) and the target of these cells, predicted cells only -> scalar mean in float32."""
        ...


class FeatureMaps(NamedTuple):
    """What an encoder gives a task that predicts at every place, block by block (stage by stage), first to last."""

    dims: tuple[int, ...]
    """Width of each map."""
    strides: tuple[int, ...]
    """Pixels per cell of each map; all the same in plain encoders."""


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


class Head(Protocol):
    """`heads/*.py`. Built with `encoder_dim`, `out_dim` and the corruption's `hidden_enter`.

    ValueError from the constructor where it cannot work with these.
    """

    needs_hidden_tokens: bool
    """Whether it reads the encoder's tokens at hidden cells, which not every corruption makes."""
    reads_visible: bool
    """Whether it reads tokens of visible cells; where no head does, the last block leaves them out."""

    def __call__(self, features: EncoderOutput) -> Tensor:
        """-> (B, P, out_dim) for the predicted cells, in their order."""
        ...
