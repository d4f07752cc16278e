"""Sections that several recipes share: images, optimizer, runs; and sections that name a component."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema

from mpp.recipe import registry
from mpp.recipe.flat import JsonObject
from mpp.recipe.values import (
    MOST_CHANNELS,
    BelowOne,
    FilePath,
    Float,
    Format,
    Fraction,
    ImageExtension,
    ImageSize,
    NonNegativeFloat,
    NonNegativeInt,
    Places,
    PositiveFloat,
    PositiveInt,
    TimmArgs,
    Tracker,
    growing,
    listed,
)


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Chosen(Section):
    """A component that is not its key's default: its name must be given."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.setdefault("required", []).append("name"))


class _ByName:
    """JSON schema of a component: its name alone, or its keys."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonObject:
        sections = handler(core)
        # not oneOf: of a key that fits nowhere, an editor would list the complaints of all of them
        return {"anyOf": [{"enum": self.names}, *sections.get("oneOf", [sections])]}


def component_section(kind: str, default: str) -> Any:
    """The type of a recipe key that names a component: `{name: block, ratio: 0.4}`, or `block` alone.

    The other keys are the component's keyword-only constructor arguments, checked against their annotations.
    """
    sections = []
    for name in registry.names(kind):
        component = registry.declaration(kind, name)
        fields: JsonObject = {key: tuple(argument) for key, argument in component.arguments.items()}
        fields["name"] = (Literal[name], name)
        base = Section if name == default else Chosen
        sections.append(create_model(component.class_name, __base__=base, __doc__=component.doc, **fields))

    def with_name(value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        return {"name": default, **value} if isinstance(value, dict) else value

    by_name = _ByName(list(registry.names(kind)))
    if len(sections) == 1:
        return Annotated[sections[0], BeforeValidator(with_name), by_name]
    return Annotated[reduce(or_, sections), Field(discriminator="name"), BeforeValidator(with_name), by_name]


ValueRange = tuple[float, float] | Literal["type"]
"""What counts as 0 and 1 in images that are not read as 8 bit; type: 0 and the largest number of their type."""


class Reading(TypedDict):
    """How the pixels of an image are read: the keyword arguments of whatever reads them."""

    channels: int
    formats: tuple[str, ...]
    max_image_pixels: int


class Decoding(Reading):
    """How images are decoded: the keyword arguments of whatever decodes them."""

    value_range: NotRequired[ValueRange | None]
    """Of images that are not read as 8 bit."""
    nodata: NotRequired[float | None]


class Opening(TypedDict):
    """How shards are opened: the keyword arguments of whatever opens them."""

    cache_dir: str | None
    cache_limit_bytes: float
    image_extension: str | None


class ImageData(Section):
    """How images are read, common to both jobs."""

    image_size: ImageSize
    """Side in pixels, or [height, width]."""
    channels: Annotated[PositiveInt, Field(le=MOST_CHANNELS)] = 3
    """1: grey, 3: RGB, 4: RGBA; any other number: TIFF and .npy files of so many channels, first or last."""
    value_range: Annotated[tuple[Float, Float], AfterValidator(growing)] | None = None
    """Of images that are not of 8 bit: what counts as 0 and 1 for mean and std, [0, 10000]; beyond it values are cut.
    They are read with all their bits then. Where it is not given, it is the encoder's; where that has none, images
    of 1, 3 and 4 channels are read as 8 bit, and for others it is 0 and the largest number of their type, of
    floating-point numbers 0 and 1."""
    nodata: Float | None = None
    """Of images that are not of 8 bit: the value of pixels where nothing was measured, -9999; TIFFs may name it
    themselves. These pixels, and those that are not a number, get the mean of their channel. An image of which more
    than half is missing is a bad image."""
    mean: tuple[Fraction, ...] | None = None
    """Of each channel, of pixels in [0, 1]; default: that of the weights it starts from, else 0.5."""
    std: tuple[Annotated[PositiveFloat, Field(le=1)], ...] | None = None
    """Of each channel; the same default."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip in training."""
    workers: NonNegativeInt = 2
    """Loader processes per training process."""
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "NPY", "PPM")
    """Image formats that are decoded; any other is a bad image."""
    max_image_pixels: Annotated[PositiveInt, Field(le=178_000_000)] = 64_000_000
    """Images with more pixels are bad images, refused from their header."""
    image_extension: ImageExtension | None = None
    """Of tar shards whose samples hold several images, `7.rgb.png` and `7.depth.png`: what follows the sample's name in
    that of the image to read, rgb.png. Default: every image whose name does not begin with that of another one."""
    cache_dir: FilePath | None = None
    """Folder for copies of remote shards and for indexes that cannot lie beside their shards; default
    $MPP_CACHE or ~/.cache/mpp."""
    cache_limit_gb: PositiveFloat = 200.0
    """Copies of remote shards take no more: those used least recently leave, and come again when they are needed."""

    @model_validator(mode="after")
    def _channels(self) -> ImageData:
        for key, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and len(value) != self.channels:
                raise ValueError(f"{key}: has {len(value)} values for {self.channels} channels")
        return self

    @property
    def eight_bit(self) -> bool:
        """Whether images are read as uint8."""
        return self.value_range is None and self.channels in (1, 3, 4)

    def decoding(self) -> Decoding:
        """What the readers of images want to know, as their arguments."""
        decoding: Decoding = {
            "channels": self.channels,
            "formats": self.formats,
            "max_image_pixels": self.max_image_pixels,
        }
        if not self.eight_bit:
            decoding["value_range"], decoding["nodata"] = self.value_range or "type", self.nodata
        return decoding

    def opening(self) -> Opening:
        """What whoever opens shards wants to know, as its arguments."""
        return {
            "cache_dir": self.cache_dir,
            "cache_limit_bytes": self.cache_limit_gb * 1e9,
            "image_extension": self.image_extension,
        }

    def mean_std(self) -> tuple[list[float], list[float]]:
        return list(self.mean or [0.5] * self.channels), list(self.std or [0.5] * self.channels)


DECODING = {key: ImageData.model_fields[key].default for key in ("formats", "max_image_pixels")}
"""For images that no recipe speaks of: as recipes have it where they do not say."""


def or_null(schema: JsonObject) -> None:
    schema["anyOf"].append({"type": "null"})


class Optim(Section):
    """Optimizer, linear warm-up, cosine."""

    name: Literal["adamw", "sgd"] = "adamw"
    """sgd: with Nesterov's momentum of 0.9. It wants a higher base_lr (0.2) and a lower weight_decay (1e-3), which is
    part of its gradient; convolutional networks from scratch learn better by it."""
    base_lr: PositiveFloat = 1.5e-4
    """Learning rate for 256 images; scaled by global_batch_size / 256 (Goyal et al. 2017). MAE: 1.5e-4."""
    global_batch_size: PositiveInt = 256
    """Images of one optimizer step, over all processes and accumulated micro-batches."""
    max_batch_per_device: PositiveInt = 256
    """Most images a device takes at once; more are accumulated."""
    weight_decay: NonNegativeFloat = 0.05
    """Not applied to norms, biases, tokens and positions."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    clip_grad_norm: PositiveFloat | None = None
    warmup_epochs: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt | None = None
    """Overrides warmup_epochs."""
    epochs: PositiveFloat | None = None
    """Passes over the data; this or steps."""
    steps: PositiveInt | None = None
    min_lr: NonNegativeFloat = 0.0
    """Where the cosine ends, for 256 images like base_lr."""

    @model_validator(mode="after")
    def _length(self) -> Optim:
        if (self.epochs is None) == (self.steps is None):
            both = ", not both; epochs: null or steps: null takes one away"
            raise ValueError("epochs: give one of epochs and steps" + ("" if self.steps is None else both))
        return self


class Job(Section):
    """Keys of every job."""

    job: str
    out: FilePath
    """Run folder; must be new or empty unless the run is resumed."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA devices that have it, else fp32. tf32: fp32 whose products take numbers with
    10 bits of mantissa, on CUDA devices that have it."""
    scales: dict[str, JsonObject] = {}
    """Sets of overrides by name, `tiny: {optim.steps: 3}`, that `--scale tiny` applies. Reading a recipe empties it."""


class Run(Job):
    """Keys of the jobs that train."""

    log_every_steps: PositiveInt = 50
    checkpoint_every_steps: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept, newest first."""
    if_unsaved: Literal["stop", "go_on"] = "stop"
    """Where a checkpoint cannot be written, for want of space, say; the last one of a run always stops it. Those before
    it stay in either case."""
    max_skipped_steps: NonNegativeInt = 0
    """Steps whose loss or gradient is not finite that are left out, before one stops the run."""
    hang_timeout_s: Annotated[PositiveFloat, Field(ge=5, le=1e9)] = 1800.0
    """A process that makes no progress for so long ends the run, which names it; on slow storage reading a batch and
    saving must fit in it (a guess)."""
    trackers: Annotated[
        tuple[Tracker, ...], BeforeValidator(listed, json_schema_input_type=Tracker | tuple[Tracker, ...])
    ] = ()
    """Where else the metrics go, as they are written: each wants its package."""


class LabeledData(ImageData):
    """Labeled images: a folder with a folder for each class, shards with labels, or a CSV file (image,label)."""

    train: Places
    val: Places
    labels_per_class: PositiveInt | None = None
    """Train on so many images of each class, drawn by the seed."""
    fraction: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Train on this fraction of each class, drawn by the seed; at least one image of each."""
    max_bad_fraction: Fraction = 0.05
    """Nothing starts if more of the images looked at beforehand than this fraction, and at least 2, cannot be read."""
    val_crop_fraction: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Validation: the central crop is this fraction of the resized image's side (ImageNet recipes: 0.875)."""

    @model_validator(mode="after")
    def _subset(self) -> Self:
        if self.labels_per_class is not None and self.fraction is not None:
            raise ValueError("give labels_per_class or fraction, not both")
        return self


class Architecture(Section):
    """Which timm encoder to build, or arguments for the one that `encoder` names."""

    name: str | None = None
    """timm's name, for `encoder: scratch` only."""
    args: TimmArgs = {}
    """timm's arguments. For a run or an export they change its own, such as `window_size: 7` for a Swin that was
    pretrained with windows of 6 at 192 px."""
