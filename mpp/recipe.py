"""Recipes: their schema, the YAML reader, overrides and the error messages.

A recipe is YAML 1.2: `1e-4` is a number, `yes` a string, a key given twice an error. Every error is one line
with the file and line (or "command line") and key; all errors of a recipe are reported at once.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema

from mpp import registry
from mpp.data.walk import checked_extension
from mpp.errors import UserError, without_secrets
from mpp.records import differing, flat_keys
from mpp.types import (
    BelowOne,
    Bool,
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    no_bool,
)

COMMAND_LINE = "command line"
EXAMPLES = {
    "data.shards": "FOLDER",
    "data.train": "FOLDER",
    "data.val": "FOLDER",
    "encoder": "RUN",
    "out": "FOLDER",
}
"""Required keys that recipes for one's own images leave open, and what to write."""
OPEN = "REQUIRED"
"""In place of the value of such a key, in `mpp recipe show`."""
MOST_CHANNELS = 1024
"""Of an image (a guess)."""


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

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        sections = handler(core)
        # not oneOf: of a key that fits nowhere, an editor would list the complaints of all of them
        return {"anyOf": [{"enum": self.names}, *sections.get("oneOf", [sections])]}


def component_section(folder: str, default: str) -> Any:
    """The type of a recipe key that names a component: `{name: block, ratio: 0.4}`, or `block` alone.

    The other keys are the component's keyword-only constructor arguments, checked against their annotations.
    """
    sections = []
    for name in registry.names(folder):
        cls = registry.component(folder, name)
        fields: dict[str, Any] = {
            key: (p.annotation, ... if p.default is inspect.Parameter.empty else p.default)
            for key, p in registry.recipe_arguments(cls).items()
        }
        fields["name"] = (Literal[name], name)
        base = Section if name == default else Chosen
        sections.append(create_model(cls.__name__, __base__=base, __doc__=cls.__doc__, **fields))

    def with_name(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": default, **value} if isinstance(value, dict) else value

    by_name = _ByName(registry.names(folder))
    if len(sections) == 1:
        return Annotated[sections[0], BeforeValidator(with_name), by_name]
    return Annotated[reduce(or_, sections), Field(discriminator="name"), BeforeValidator(with_name), by_name]


def _size(value: Any) -> Any:
    """32 means 32×32."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


ImageSize = Annotated[
    tuple[PositiveInt, PositiveInt],
    BeforeValidator(_size, json_schema_input_type=PositiveInt | tuple[PositiveInt, PositiveInt]),
]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the lower end comes first")
    return value


Range = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]
AreaRange = Annotated[
    tuple[Annotated[Float, Field(gt=0, le=1)], Annotated[Float, Field(gt=0, le=1)]], AfterValidator(_ordered)
]


def _growing(value: tuple[float, float]) -> tuple[float, float]:
    if not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
        raise ValueError("two finite numbers, the smaller one first")
    return value


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) or type(value) is int else value


def _no_words_for_switches(args: dict[str, Any]) -> dict[str, Any]:
    """Python takes any text for true, "no" and "false", too."""
    for key, value in args.items():
        if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "true", "false"):
            raise ValueError(f"{key}: '{value}' is text; write true or false")
    return args


TimmArgs = Annotated[dict[str, Any], AfterValidator(_no_words_for_switches)]
"""Arguments of a timm model, by name."""


def _each_once(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("each once")
    return values


LabelCounts = Annotated[
    tuple[PositiveInt, ...],
    BeforeValidator(
        lambda value: (value,) if isinstance(value, int) and not isinstance(value, bool) else value,
        json_schema_input_type=PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)],
    ),
    AfterValidator(_each_once),
    Field(min_length=1),
]
"""100 means [100]."""


def _path(value: str) -> str:
    if "\0" in value or not value:
        raise ValueError("not a path")
    return os.path.expanduser(value)


def _number_as_name(value: Any) -> Any:
    """A folder may be called 2024, which YAML reads as a number."""
    return str(value) if type(value) is int else value


FilePath = Annotated[str, BeforeValidator(_number_as_name, json_schema_input_type=str), AfterValidator(_path)]
"""A file, folder, pattern or URL; `~` is the home folder."""
Places = Annotated[
    tuple[FilePath, ...],
    BeforeValidator(_listed, json_schema_input_type=FilePath | Annotated[tuple[FilePath, ...], Field(min_length=1)]),
    Field(min_length=1),
]
"""One of them, or a list."""


Tracker = Literal["tensorboard", "wandb", "trackio"]
Probe = Literal["knn", "linear", "attentive"]


Format = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "NPY", "PPM"]
"""Of images, as Pillow names them, and numpy's."""


class ImageData(Section):
    """How images are read, common to both jobs."""

    image_size: ImageSize
    """Side in pixels, or [height, width]."""
    channels: Annotated[PositiveInt, Field(le=MOST_CHANNELS)] = 3
    """1: grey, 3: RGB, 4: RGBA; any other number: TIFF and .npy files of so many channels, first or last."""
    value_range: Annotated[tuple[Float, Float], AfterValidator(_growing)] | None = None
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
    image_extension: Annotated[str, AfterValidator(checked_extension)] | None = None
    """Of tar shards whose samples hold several images, `7.rgb.png` and `7.depth.png`: what follows the sample's name in
    that of the image to read, rgb.png. Default: every image whose name does not begin with that of another one."""
    cache_dir: FilePath | None = None
    """Folder for copies of remote shards and for indexes that cannot lie beside their shards; default
    $MPP_CACHE or ~/.cache/mpp."""
    cache_limit_gb: PositiveFloat = 200.0
    """Copies of remote shards take no more: those used least recently leave, and come again when they are needed."""

    @model_validator(mode="after")
    def _channels(self) -> ImageData:
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and len(value) != self.channels:
                raise ValueError(f"{key}: has {len(value)} values for {self.channels} channels")
        return self

    @model_validator(mode="after")
    def _eight_bit_alone(self) -> Self:
        if not self.eight_bit:
            for key in ("auto_augment", "color_jitter"):
                if getattr(self, key, None) is not None:
                    raise ValueError(f"{key}: for images of 8 bit with 1, 3 or 4 channels alone, without value_range")
        return self

    @property
    def eight_bit(self) -> bool:
        """Whether images are read as uint8."""
        return self.value_range is None and self.channels in (1, 3, 4)

    def check_nodata(self) -> None:
        """UserError for a nodata that nothing reads; what the encoder's folder says must be filled in before."""
        if self.nodata is not None and self.eight_bit:
            raise UserError("data.nodata: only with data.value_range, or data.channels other than 1, 3 and 4")

    def decoding(self) -> dict[str, Any]:
        """What the readers of images want to know, as their arguments."""
        found: dict[str, Any] = {"channels": self.channels, "formats": self.formats}
        found["max_image_pixels"] = self.max_image_pixels
        if self.eight_bit:
            return found
        return found | {"value_range": self.value_range or "type", "nodata": self.nodata}

    def opening(self) -> dict[str, Any]:
        """What whoever opens shards wants to know, as its arguments."""
        keys = {"cache_dir": self.cache_dir, "cache_limit_bytes": self.cache_limit_gb * 1e9}
        return keys | {"image_extension": self.image_extension}

    def mean_std(self) -> tuple[list[float], list[float]]:
        return list(self.mean or [0.5] * self.channels), list(self.std or [0.5] * self.channels)


DECODING = {key: ImageData.model_fields[key].default for key in ("formats", "max_image_pixels")}
"""For images that no recipe speaks of: as recipes have it where they do not say."""


class PretrainData(ImageData):
    """Unlabeled images."""

    shards: Places
    """Tar shards: a folder, a file, a pattern (`*`, `{000..099}`), an URL, or a list of these. Or images as they are: a
    folder of them, or a CSV file whose column `image` names them; for many images `mpp pack` is worth its while."""
    crop_scale: AreaRange = (0.2, 1.0)
    """Random resized crop: range of the crop's area (MAE: 0.2 to 1; SimMIM: 0.67 to 1)."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Random resized crop: range of the crop's aspect ratio."""
    held_out: PositiveInt = 256
    """Images taken from the ends of the shards, never trained on, for the skill."""
    max_bad_fraction: Fraction = 0.001
    """The run stops when more images than this fraction, and at least 100, could not be read."""
    lanes: PositiveInt = 256
    """Most runs of shards that are read side by side; see `data/order.py`. Fewer need less of `cache_limit_gb`."""
    window: PositiveInt = 4096
    """Samples shuffled at a time within a lane."""

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_key(cls, values: Any) -> Any:
        """Recipes that runs wrote while `resize_on` existed hold its default, which is what happens now."""
        if isinstance(values, dict) and values.get("resize_on") == "cpu":
            return {key: value for key, value in values.items() if key != "resize_on"}
        return values


class Encoder(Section):
    """Any timm encoder with a map of features; `mpp models` lists the families that were tried."""

    name: str = "vit_base_patch16_224"
    """Name of the timm model; or the folder of a run or an export, such as `mpp import` makes, whose weights and
    architecture it starts from."""
    args: TimmArgs = {}
    """timm's arguments for it, such as patch_size, embed_dim, depth, num_heads, drop_path_rate."""
    pretrained: Bool = False
    """Start from timm's published weights of this name."""
    weight_init: Literal["timm", "mae"] = "timm"
    """How random weights are drawn. mae: as MAE's published code does for plain ViTs: linear layers and patch embedding
    from Xavier's uniform distribution, the class token from N(0, 0.02²), fixed sine-cosine positions."""
    grad_checkpointing: Bool = False
    """Recompute activations in the backward pass: slower, less memory."""


def _or_null(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"type": "null"})


def _own_loss(values: Any) -> Any:
    """Where no loss is named: mse, or cross_entropy for a target of classes."""
    if isinstance(values, Mapping) and values.get("loss") is None:
        named = values.get("target")
        name = named.get("name") if isinstance(named, Mapping) else named
        known = isinstance(name, str) and name in registry.names("targets")
        classes = known and registry.component("targets", str(name)).of == "classes"
        return {**values, "loss": "cross_entropy" if classes else "mse"}
    return values


def _fitting_loss(section: Any) -> Any:
    """Values are compared by distances, classes by cross-entropy."""
    of = registry.component("targets", section.target.name).of
    if registry.component("losses", section.loss.name).of != of:
        fitting = [n for n in registry.names("losses") if registry.component("losses", n).of == of]
        raise ValueError(
            f"loss: {section.loss.name} is not for {of}, which target {section.target.name} has; "
            f"allowed with it: {', '.join(fitting)}"
        )
    return section


class ExtraTarget(Section):
    """One more target on the same forward, with a head and a loss of its own."""

    target: component_section("targets", "pixels") = Field({}, validate_default=True)  # type: ignore[valid-type]
    loss: component_section("losses", "mse") = Field(None, json_schema_extra=_or_null)  # type: ignore[valid-type]
    """Default: mse, or cross_entropy for a target of classes."""
    head: component_section("heads", "linear") = Field({}, validate_default=True)  # type: ignore[valid-type]
    weight: PositiveFloat = 1.0
    """Of its loss in the sum; the first target's is 1."""

    _default_loss = model_validator(mode="before")(_own_loss)
    _loss_fits = model_validator(mode="after")(_fitting_loss)


class Optim(Section):
    """AdamW, linear warm-up, cosine."""

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
    scales: dict[str, dict[str, Any]] = {}
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
        tuple[Tracker, ...], BeforeValidator(_listed, json_schema_input_type=Tracker | tuple[Tracker, ...])
    ] = ()
    """Where else the metrics go, as they are written: each wants its package."""


class OnlineProbe(Section):
    """A linear probe of the encoder in training, on few labeled images: a monitor, not evidence."""

    train: Places
    val: Places
    """Labeled images, as in fine-tuning; they are looked at, never trained on."""
    every_steps: PositiveInt = 2000
    images: PositiveInt = 1000
    """Most images of either, drawn by the seed and held in memory: what bounds the cost."""
    weight_decay: PositiveFloat = 0.01
    """As in `mpp evaluate` (guess)."""


class PretrainRecipe(Run):
    """Masked-patch pretraining on unlabeled shards."""

    job: Literal["pretrain"] = "pretrain"
    seed: Annotated[NonNegativeInt, Field(lt=2**56)] = 0
    """Of the initial weights, the order, crops, masks and whatever else is drawn."""
    data: PretrainData
    encoder: Encoder = Encoder()
    mask: component_section("masks", "uniform") = Field({}, validate_default=True)  # type: ignore[valid-type]
    corruption: component_section("corruptions", "token") = Field({}, validate_default=True)  # type: ignore[valid-type]
    target: component_section("targets", "norm_pixels") = Field({}, validate_default=True)  # type: ignore[valid-type]
    loss: component_section("losses", "mse") = Field(None, json_schema_extra=_or_null)  # type: ignore[valid-type]
    """Default: mse, or cross_entropy for a target of classes."""
    head: component_section("heads", "linear") = Field({}, validate_default=True)  # type: ignore[valid-type]
    extra_targets: tuple[ExtraTarget, ...] = ()
    """More targets on the same forward: `[{target: pixels, head: linear, weight: 0.5}]`."""
    predict_fraction: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Part of the hidden cells that is predicted."""
    optim: Optim
    compile: Bool = False
    """torch.compile of the forward and backward pass: a minute at the start, then 1.03 to 1.2 times as fast on a CPU
    (recipes/LOG.md). It rounds otherwise. Wants a C++ compiler, on GPUs Triton."""
    fsdp: Bool = False
    """Share weights, gradients and moments out among the processes (FSDP2), where they are too large for each; set
    encoder.grad_checkpointing, too. A whole copy of the weights waits in the host's memory; each device must have room
    for it to evaluate and to export. Checkpoints are written in parts."""
    skill_every_steps: PositiveInt = 500
    """Steps between measurements of the skill on held-out images."""
    reconstruct_images: NonNegativeInt = 6
    """Held-out images whose reconstructions are kept as the run goes, where the target has a picture; 0: none."""
    probe: OnlineProbe | None = None
    """Probe the encoder now and then; it changes nothing in training."""

    _default_loss = model_validator(mode="before")(_own_loss)
    _loss_fits = model_validator(mode="after")(_fitting_loss)

    @model_validator(mode="after")
    def _colours(self) -> Self:
        sections: tuple[Any, ...] = (self, *self.extra_targets)
        for section in sections:
            if not self.data.eight_bit and registry.component("targets", section.target.name).of == "classes":
                raise ValueError(
                    f"target: {section.target.name} takes classes from pixels of 8 bit; with data.value_range, or "
                    "channels other than 1, 3 and 4, allowed are pixels, norm_pixels, hog, teacher, ema_teacher"
                )
        return self

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.compile and self.fsdp:
            raise ValueError("compile: not together with fsdp: true, whose gathering it cannot follow")
        return self


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


class FinetuneData(LabeledData):
    """Labeled images, and how they are augmented; `mean` and `std` are the encoder's own where they are not given."""

    labels_per_class: LabelCounts | None = None  # type: ignore[assignment]
    """Train on so many images of each class, drawn by the seed; a list, [10, 100, 500], fine-tunes on each of them."""
    crop_scale: AreaRange = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    auto_augment: str | None = None
    """timm's policy string, such as rand-m9-mstd0.5-inc1 (RandAugment)."""
    color_jitter: NonNegativeFloat | None = None
    erase: Fraction = 0.0
    """Probability of random erasing (Zhong et al. 2020)."""
    val_views: Annotated[Literal[1, 2, 10], BeforeValidator(no_bool)] = 1
    """Views of a validation image whose probabilities are averaged: 2: mirrored, too; 10: corners, too (Krizhevsky et
    al. 2012, section 4.1)."""
    val_side_px: PositiveInt | None = None
    """With task: segment: shorter side to which validation images are scaled, then read in overlapping windows of
    image_size; default: the shorter of image_size."""

    def label_counts(self) -> tuple[int | None, ...]:
        """Labels of each class, from few to many; None: as many as there are, or a fraction."""
        return tuple(sorted(self.labels_per_class)) if self.labels_per_class else (None,)


class Architecture(Section):
    """Which timm encoder to build, or arguments for the one that `encoder` names."""

    name: str | None = None
    """timm's name, for `encoder: scratch` only."""
    args: TimmArgs = {}
    """timm's arguments. For a run or an export they change its own, such as `window_size: 7` for a Swin that was
    pretrained with windows of 6 at 192 px."""


class FinetuneOptim(Optim):
    """As in pretraining, and what fine-tuning adds."""

    base_lr: PositiveFloat = 5e-4
    """For 256 images (MAE, table 9: 5e-4 for ViT-L/H, 5e-4 for ViT-B)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    layer_decay: Annotated[Float, Field(gt=0, le=1)] = 0.75
    """Learning rate of a layer over that of the next (BEiT; MAE: 0.75). The scratch arm uses 1."""
    head_lr_scale: PositiveFloat = 1.0
    """Learning rate of the new head over that of the last layer."""


class Scratch(Section):
    """What the arm from scratch does otherwise; None: as the pretrained arm."""

    base_lr: PositiveFloat | None = None
    layer_decay: Annotated[Float, Field(gt=0, le=1)] | None = 1.0
    """1: layer decay protects pretrained layers, and there are none."""
    frozen: Fraction | None = 0.0
    """0: nothing is worth standing still for."""


class Distill(Section):
    """A teacher beside the labels (DeiT, Touvron et al. 2021, section 4).

    An encoder with a distillation token (`deit_*_distilled_*`) learns from it there, any other through its one head.
    """

    teacher: FilePath
    """A fine-tuned cell (runs/a/pretrained-seed0), its export, or a name of timm's, with a classifier of the same
    classes."""
    kind: Literal["hard", "soft"] = "hard"
    """hard: the teacher's likeliest class is a second label; soft: its probabilities are."""
    alpha: Fraction = 0.5
    """The teacher's part of the loss (DeiT: 0.5 with hard, 0.1 with soft)."""
    temperature: PositiveFloat = 3.0
    """Of soft labels (DeiT: 3)."""


class Lora(Section):
    """Low-rank adapters (LoRA, Hu et al. 2022) in place of the encoder's own weights, which stand still.

    Wants the package peft. Adapters are merged at the end: the export is a plain encoder. The arm from scratch has
    none: it has nothing worth standing still for.
    """

    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    """alpha / rank is the adapters' scale (guess: 2)."""
    dropout: BelowOne = 0.0
    """On what the adapters see."""


class EarlyStop(Section):
    """Judge on a part of the training images now and then, stop when it no longer rises, and go back to the best.

    The validation images stay out of it.
    """

    fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """Part of the training images of each class that is judged on, and not trained on."""
    every_steps: PositiveInt = 100
    patience: PositiveInt = 5
    """Measurements without a new best before it stops."""


class FinetuneRecipe(Run):
    """Fine-tuning on labeled images, beside the same from scratch."""

    job: Literal["finetune"] = "finetune"
    encoder: FilePath
    """A pretraining run, an exported folder, a name of timm's, or scratch."""
    architecture: Architecture | None = None
    beside_scratch: Bool = True
    """Run the same fine-tune from scratch, too."""
    seeds: Annotated[
        tuple[Annotated[NonNegativeInt, Field(lt=2**56)], ...], Field(min_length=1), AfterValidator(_each_once)
    ] = (0, 1, 2)
    """Each draws its own labels, order and initial head."""
    data: FinetuneData
    task: component_section("tasks", "classify") = Field({}, validate_default=True)  # type: ignore[valid-type]
    pool: Literal["mean", "token"] = "mean"
    """Features of an image: the mean of its patch tokens, or the class token. Pretraining trains the class token's last
    output only with the heads transformer and cross_attention."""
    fc_norm: Bool | None = None
    """With `pool: mean`. true: norm the mean by a new norm, in place of the encoder's final one, as MAE's fine-tuning
    does. false: norm each token by the encoder's final norm, then take the mean. Default: as the encoder has it."""
    drop_path_rate: BelowOne = 0.0
    mixup: NonNegativeFloat = 0.0
    """Alpha of the beta distribution (Zhang et al. 2018); 0: none."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of the beta distribution (Yun et al. 2019); 0: none."""
    frozen: Fraction = 0.0
    """Part of the steps in which the head alone learns: 1 is a frozen encoder; below 1, LP-FT (Kumar et al. 2022),
    whose backward pass still goes through the encoder."""
    unfreeze: Literal["at_once", "gradual"] = "at_once"
    """After `frozen`. gradual: block by block, the last one first (ULMFiT, Howard & Ruder 2018, section 3.3)."""
    ema_decay: BelowOne | None = None
    """Judge and export a moving average of the weights, such as 0.9999; it moves faster in the first steps."""
    balance: Literal["none", "sampling", "loss"] = "none"
    """Classes of unequal size. sampling: images of small classes come more often; loss: they count for more."""
    early_stop: EarlyStop | None = None
    lora: Lora | None = None
    """Train adapters beside the encoder's linear layers: `lora={}`."""
    distill: Distill | None = None
    """Learn from a teacher, too; both arms do."""
    optim: FinetuneOptim
    scratch: Scratch = Scratch()

    @model_validator(mode="after")
    def _places_in_colour(self) -> Self:
        if self.task.name in ("segment", "detect") and not self.data.eight_bit:
            raise ValueError(f"task: {self.task.name}: for images of 8 bit with 1, 3 or 4 channels alone")
        return self

    @model_validator(mode="after")
    def _architecture(self) -> FinetuneRecipe:
        named = self.architecture and self.architecture.name
        if self.encoder == "scratch" and not named:
            raise ValueError("encoder: scratch needs architecture.name, a name of timm's")
        if self.fc_norm and self.pool == "token":
            raise ValueError("fc_norm: norms the mean of the patch tokens; not with pool: token")
        if self.unfreeze == "gradual" and not 0 < self.frozen < 1:
            raise ValueError("unfreeze: gradual: wants `frozen` between 0 and 1, the part of the steps that it takes")
        if self.lora and self.frozen == 1:
            raise ValueError("lora: its adapters are in the encoder, which `frozen: 1` keeps as it is")
        if self.lora and self.encoder == "scratch":
            raise ValueError("lora: with encoder: scratch there is nothing to adapt")
        side_px = self.data.val_side_px
        if side_px is not None and side_px < min(self.data.image_size):
            raise ValueError(f"data: val_side_px: at least the shorter of image_size, {min(self.data.image_size)}")
        labels = registry.component("tasks", self.task.name).labels
        off: dict[str, Any] = {}
        if labels != "class":
            off = {"mixup": 0.0, "cutmix": 0.0, "balance": "none", "distill": None, "data.labels_per_class": None}
        if labels in ("mask", "boxes"):
            off |= {
                "pool": "mean",
                "fc_norm": None,
                "data.auto_augment": None,
                "data.erase": 0.0,
                "data.val_crop_fraction": 1.0,
            }
            off["data.val_views"] = 1
        if labels != "mask":
            off["data.val_side_px"] = None
        elif self.balance == "loss":
            del off["balance"]
        for key, value in off.items():
            if reduce(getattr, key.split("."), self) != value:
                instead = "; allowed: data.fraction" if key == "data.labels_per_class" else ""
                section, _, rest = key.rpartition(".")
                where = f"{section}: {rest}" if section else rest
                raise ValueError(f"{where}: not with task: {self.task.name}{instead}")
        return self


class EvaluateData(LabeledData):
    """Labeled images; size and normalisation are the encoder's own where they are not given."""

    image_size: ImageSize | None = None  # type: ignore[assignment]
    """Side in pixels, or [height, width]; default: the encoder's."""
    batch_size: PositiveInt = 256
    """Images a device takes at once."""


class Knn(Section):
    """Nearest neighbours by cosine similarity, each with one vote."""

    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 5, 10, 20, 50, 100, 200)
    """Numbers of neighbours that are tried (around the 10 to 200 of DINO, Caron et al. 2021, section 4.1)."""


class LinearProbe(Section):
    """Multinomial logistic regression on standardised features, by L-BFGS."""

    weight_decay: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0,
    )  # fmt: skip
    """Values tried: λ of mean cross-entropy + λ/2 · |weights|² (CLIP, Radford et al. 2021, A.3, sweeps 1e-6 to 1e6)."""
    max_iterations: PositiveInt = 200


class AttentiveProbe(Section):
    """One learned query that attends to the patch tokens, then a linear layer (CAE, Chen et al. 2022, section 4.1)."""

    batch_size: PositiveInt = 64

    lr: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (3e-4, 1e-3, 3e-3)
    """Learning rates tried (guess)."""
    epochs: PositiveInt = 20
    """Passes over the training images (guess)."""
    weight_decay: NonNegativeFloat = 0.01


def _out_may_be_left_out(schema: dict[str, Any]) -> None:
    schema["required"].remove("out")
    schema["properties"]["out"]["type"] = ["string", "null"]


class EvaluateRecipe(Job):
    """What a frozen encoder's features are worth, layer by layer, beside controls."""

    model_config = ConfigDict(json_schema_extra=_out_may_be_left_out)

    job: Literal["evaluate"] = "evaluate"
    encoder: FilePath
    """A pretraining run, an exported folder, or a name of timm's."""
    architecture: Architecture | None = None
    compare: FilePath | None = None
    """Another encoder, read in the same way."""
    controls: Bool = True
    """Evaluate the same architecture at random initialisation, and raw pixels, too."""
    seed: Annotated[NonNegativeInt, Field(lt=2**56)] = 0
    """Of the labels drawn, the split of the training images, the random initialisation and the attentive probe."""
    data: EvaluateData
    probes: Annotated[
        tuple[Probe, ...],
        BeforeValidator(_listed, json_schema_input_type=Probe | Annotated[tuple[Probe, ...], Field(min_length=1)]),
        Field(min_length=1),
    ] = ("knn", "linear", "attentive")
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Blocks (stages, in hierarchical families) whose output is probed, counted from 1; default: all. Beside them
    always "out", what the plain timm model gives for an image."""
    tune_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """Part of the training images on which k, weight decay, learning rate and the best layer are chosen."""
    knn: Knn = Knn()
    linear: LinearProbe = LinearProbe()
    attentive: AttentiveProbe = AttentiveProbe()
    keep_features: Bool = False
    """Leave the features in the run folder, as .npy files."""

    @model_validator(mode="before")
    @classmethod
    def _own_out(cls, values: Any) -> Any:
        """Where no run folder is named: inside the run that made the encoder, or evaluation/NAME."""
        encoder = values.get("encoder") if isinstance(values, Mapping) else None
        if not isinstance(encoder, str) or values.get("out") is not None:
            return values
        run = Path(encoder).expanduser()
        out = run / "evaluation" if (run / "encoder").is_dir() else Path("evaluation") / run.name
        return {**values, "out": str(out)}


RECIPES: dict[str, type[Job]] = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "evaluate": EvaluateRecipe}
MAY_CHANGE = {
    "out", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "data.workers", "data.cache_dir",
    "data.cache_limit_gb", "seeds", "data.batch_size", "keep_features", "data.max_bad_fraction",
    "optim.max_batch_per_device", "encoder.grad_checkpointing", "reconstruct_images",
    "trackers", "if_unsaved", "hang_timeout_s", "max_skipped_steps", "compile", "fsdp",
    "data.shards", "data.train", "data.val",  # where they are: what they hold has a fingerprint
}  # fmt: skip
"""Keys a resumed run may change: they do not change what is computed, but for rounding and for what micro-batches
decide: draws of drop path, mixup and random erasing, and statistics of batch norms."""

R = TypeVar("R", bound=Job)

# ---- reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core numbers and booleans, of whole numbers the decimal ones alone. PyYAML's own reads `1e-4` as a
    string, `yes` as true, `010` as 8 and `12:30` as 750."""


_KEPT = ("null", "merge", "value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)

TEXT_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "value"))

Key = tuple[str | int, ...]


def parse_yaml(text: str, source: str) -> tuple[dict[str, Any], dict[Key, str]]:
    """-> the mapping, and for each key where it stands ("file:line"). UserError for what is not such YAML."""
    places: dict[Key, str] = {}
    errors: list[str] = []

    def walk(node: yaml.Node, key: Key) -> None:
        places.setdefault(key, f"{source}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            for k, v in node.value:
                inner = (*key, k.value)
                place = f"{source}:{k.start_mark.line + 1}"
                if not isinstance(k, yaml.ScalarNode) or k.tag not in TEXT_TAGS:
                    shown = k.value if isinstance(k, yaml.ScalarNode) else "a list or mapping"
                    errors.append(f"{place}: {dotted((*key, shown))}: keys must be text; put quotes around this one")
                elif inner in places:
                    errors.append(
                        f"{place}: {dotted(inner)}: given twice; first at line {places[inner].rsplit(':')[-1]}"
                    )
                else:
                    places[inner] = place
                    walk(v, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, v in enumerate(node.value):
                walk(v, (*key, i))

    try:
        node = yaml.compose(text, _Loader)
        value = yaml.load(text, _Loader)
        if node is not None:
            walk(node, ())
    # constructors of tags such as !!float and !!timestamp raise what they like; an alias may hold itself
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}{line}: not valid YAML: {problem}") from error
    if node is None:
        return {}, places
    if errors:
        raise UserError("\n".join(errors))
    if not isinstance(value, dict):
        raise UserError(f"{source}:1: a recipe is a mapping of keys to values; got {type(value).__name__}")
    return value, places


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def apply_scale(values: dict[str, Any], places: dict[Key, str], scale: str | None, source: str) -> None:
    """Apply one of the recipe's own sets of overrides and take the sets out. UserError where it has none so named."""
    scales = values.pop("scales", None) or {}
    if not isinstance(scales, dict):
        raise UserError(f"{places.get(('scales',), source)}: scales: must be names with keys; got {scales!r}")
    for name, chosen in scales.items():
        if not isinstance(chosen, dict) or not all(isinstance(key, str) for key in chosen):
            place = places.get(("scales", str(name)), source)
            raise UserError(f"{place}: scales.{name}: must be keys with values, such as optim.steps: 3; got {chosen!r}")
    if scale is None:
        return
    if scale not in scales:
        raise UserError(f"--scale {scale}: {source} has {', '.join(map(str, scales)) or 'no scales'}")
    given_at = {key: places.get(("scales", scale, key), source) for key in scales[scale]}
    apply_overrides(values, places, scales[scale], given_at)


def apply_overrides(
    values: dict[str, Any], places: dict[Key, str], overrides: dict[str, Any], given_at: Mapping[str, str] | None = None
) -> None:
    """Set dotted keys in place. Values that are strings are read as YAML, as on the command line.

    given_at: where each of them stands; default: on the command line.
    """
    # which component, before its keys, in whatever order they were given
    names_first = sorted(overrides.items(), key=lambda item: not _names_component(item[0]))
    for name, value in names_first:
        *outer, last = name.split(".")
        place = (given_at or {}).get(name, COMMAND_LINE)
        if name.split(".")[0] == "scales":
            raise UserError(f"{place}: {name}: scales are the recipe's own; give the key itself")
        node: Any = values
        key: list[str | int] = []
        for part in outer:
            if isinstance(node, list):  # extra_targets.0.weight
                key.append(_item(f"{place}: {name}", node, part))
                inner = node[int(part)]
            else:
                key.append(part)
                if part not in node:
                    places[tuple(key)] = place
                inner = node.setdefault(part, {})
                if isinstance(inner, str) and registry_key(part):  # `mask: block` and then mask.ratio=0.5
                    inner = node[part] = {"name": inner}
            if not isinstance(inner, dict | list):
                raise UserError(f"{place}: {name}: {dotted(tuple(key))} has no keys; it is {inner!r}")
            node = inner
        value = os.fspath(value) if isinstance(value, os.PathLike) else _override_value(f"{place}: {name}", value)
        if isinstance(node, list):
            key.append(_item(f"{place}: {name}", node, last))
            node[int(last)] = value
        else:
            if last == "name" and outer and registry_key(outer[-1]) and node.get("name", value) != value:
                node.clear()  # another component has other keys
            key.append(last)
            same = isinstance(value, str) and registry_key(last) and isinstance(node.get(last), dict)
            if same and node[last].get("name") == value:
                continue  # `mask=uniform` where it is: its keys stay
            node[last] = value
        for old in [k for k in places if k[: len(key)] == tuple(key)]:
            del places[old]
        places[tuple(key)] = place


def _item(what: str, items: list[Any], part: str) -> int:
    """The place in a list that an override names. what: the override, for the error."""
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(f"{what}: '{part}': the list has items 0 to {len(items) - 1}")
    return int(part)


def _override_value(what: str, value: Any) -> Any:
    """A string is read as YAML, but for what only a path or pattern can be: `*.tar`, `runs/try #2`."""
    if not isinstance(value, str) or value.startswith(("*", "&", "!", "@", "%", "`")):
        return value
    if re.search(r"[\ud800-\udfff]", value):  # bytes in a file's name that are not text, which YAML does not take
        return value
    try:
        node = yaml.compose(value, _Loader)
        if node is not None and value[node.end_mark.index :].lstrip().startswith("#"):
            return value  # a comment nobody meant
        if isinstance(node, yaml.MappingNode):
            return parse_yaml(value, what)[0]  # a key given twice is an error here, too
        return yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{what}: not a YAML value: {value}") from error


def _names_component(name: str) -> bool:
    return registry_key(name.removesuffix(".name"))


def registry_key(part: str) -> bool:
    """Whether a recipe key names a component."""
    return part in ("mask", "corruption", "target", "loss", "head", "task")


def parse_overrides(pairs: tuple[str, ...], example: str = "optim.base_lr=1e-4") -> dict[str, str]:
    """`key=value` words of the command line. UserError for a word of another form."""
    for pair in pairs:
        if not re.match(r"[A-Za-z_]\w*(\.\w+)*=", pair):
            raise UserError(f"{COMMAND_LINE}: '{pair}': write key=value, such as {example}")
    given: dict[str, str] = {}
    for word in ("recipe", "resume", "scale"):
        if any(pair.startswith(f"{word}=") for pair in pairs):
            raise UserError(f"{COMMAND_LINE}: {word}: no key of a recipe; see --help for --{word} and its like")
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key in given:
            raise UserError(
                f"{COMMAND_LINE}: {key}: given twice: {given[key]}, {value}. Several values are a list, "
                f"'{key}=[a, b]'; quote braces, or the shell makes several words of them"
            )
        given[key] = value
    return given


def bundled() -> dict[str, Path]:
    """Recipes that come with mpp by their names, such as pretrain/vit_small: of the wheel, or of the checkout."""
    here = Path(__file__).resolve().parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    found = {job: sorted((folder / job).glob("*.yaml")) for job in ("pretrain", "finetune")}
    return {f"{job}/{path.stem}": path for job, paths in found.items() for path in paths}


def _text(path: str | Path) -> str:
    """Of a recipe's file; where there is none, of the one of that name that comes with mpp. UserError."""
    place = Path(path)
    try:
        if not place.exists():
            name = place.as_posix().removeprefix("recipes/").removesuffix(".yaml")
            place = bundled().get(name, place)
        return place.read_text(encoding="utf-8")
    except OSError as error:
        advice = ""
        if isinstance(error, FileNotFoundError) and not place.is_absolute():
            alike = " or ".join(name for name in bundled() if name.split("/")[1] == place.stem)
            advice = f"; {f'is {alike} meant? ' if alike else ''}`mpp recipe list` names those that come with mpp"
        raise UserError(f"{path}: {error.strerror or error}{advice}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error


def load_recipe(path: str | Path, job: type[R], overrides: dict[str, Any] | None = None, scale: str | None = None) -> R:
    """Read and check a recipe. scale: one of its `scales`, applied before the overrides.

    UserError with a line for each thing that is wrong.
    """
    values, places = parse_yaml(_text(path), str(path))
    apply_scale(values, places, scale, str(path))
    apply_overrides(values, places, overrides or {})
    return check_recipe(values, job, places, str(path))


def load_any(path: str | Path, overrides: dict[str, Any] | None = None, scale: str | None = None) -> Job:
    """As `load_recipe`, for the job that the recipe names (`job: pretrain` where it names none)."""
    return load_recipe(path, _job_of(path), overrides, scale)


def load_open(path: str | Path, overrides: dict[str, Any], scale: str | None) -> tuple[Job, list[str]]:
    """As `load_any`, of a recipe that leaves required keys to the command line: these are OPEN, and listed."""
    job = _job_of(path)
    required = [key for key, f in _leaves(job).items() if key in EXAMPLES and f.is_required()]
    values, places = parse_yaml(_text(path), str(path))
    apply_scale(values, places, scale, str(path))
    apply_overrides(values, places, overrides)
    left = [key for key in required if flat_keys(values).get(key) is None]
    apply_overrides(values, places, dict.fromkeys(left, OPEN))
    return check_recipe(values, job, places, str(path)), left


def _job_of(path: str | Path) -> type[Job]:
    job = parse_yaml(_text(path), str(path))[0].get("job")
    return RECIPES.get(job, PretrainRecipe) if isinstance(job, str) else PretrainRecipe


def checked(
    recipe: str | Path | Mapping[str, Any] | R, job: type[R], overrides: dict[str, Any], scale: str | None = None
) -> R:
    """A recipe from a file, a mapping of its keys or, already checked, with one of its scales and overrides applied."""
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, job, overrides, scale)
    if isinstance(recipe, Mapping):
        values = deepcopy(dict(recipe))
    elif isinstance(recipe, job):
        values = recipe.model_dump(mode="json", exclude_unset=True)  # which keys were given may matter, see `read_as`
    elif isinstance(recipe, Job):
        raise UserError(f"this is a recipe of `mpp {recipe.job}`, not of `mpp {job.model_fields['job'].default}`")
    else:
        raise UserError(f"recipe: a file, a mapping of keys or a checked recipe; got {type(recipe).__name__}")
    places: dict[Key, str] = {}
    apply_scale(values, places, scale, "recipe")
    apply_overrides(values, places, overrides)
    return check_recipe(values, job, places)


def check_recipe(
    values: dict[str, Any], job: type[R], places: dict[Key, str] | None = None, source: str = "recipe"
) -> R:
    """Validate a mapping. UserError with a line for each thing that is wrong."""
    expected = job.model_fields["job"].default
    named = values.get("job", "pretrain")
    if isinstance(named, str) and named != expected and named in RECIPES:
        raise UserError(
            f"{source}: job: this is a recipe of `mpp {named}`, not of `mpp {expected}` (which says job: {expected})"
        )
    try:
        return job.model_validate(values)
    except ValidationError as error:
        places = places or {}
        found = error.errors()
        # a list whose items are wrong is not too short as well
        items = {e["loc"][:-1] for e in found if e["loc"] and isinstance(e["loc"][-1], int)}
        found = [e for e in found if not (e["type"] == "too_short" and e["loc"] in items)]
        lines = {_error_line(e, job, places, source): None for e in found}
        raise UserError("\n".join(lines)) from None


def _error_line(error: Any, job: type[Job], places: dict[Key, str], source: str) -> str:
    key, fields = _without_tags(tuple(error["loc"]), job)
    kind, context, got = error["type"], error.get("ctx", {}), error.get("input")
    place = next((places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in places), source)
    if kind == "extra_forbidden":
        # a slip of the pen, or a key that belongs elsewhere
        here = difflib.get_close_matches(str(key[-1]), fields, 1, 0.6)
        close = [dotted((*key[:-1], here[0]))] if here else [k for k in _leaves(job) if k.split(".")[-1] == key[-1]]
        hint = f" Did you mean '{close[0]}'?" if close and close[0] != dotted(key) else ""
        return f"{place}: {dotted(key)}: unknown key.{hint} Allowed here: {', '.join(sorted(fields))}"
    if kind == "missing":
        example = f"; add {dotted(key)}={EXAMPLES[dotted(key)]}" if dotted(key) in EXAMPLES else ""
        return f"{place}: {dotted(key)}: required{example}"
    if kind in ("union_tag_invalid", "literal_error"):
        choices = str(context.get("expected_tags") or context.get("expected", ""))
        words = re.findall(r"'([^']*)'", choices) or re.split(r", | or ", choices)
        name = dotted((*key, "name")) if kind == "union_tag_invalid" else dotted(key)
        place = places.get((*key, "name"), place)
        value = context.get("tag", got)
        close = [] if str(value) in words else difflib.get_close_matches(str(value), words, 1, 0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"{place}: {name}: no such choice; got {value!r}.{hint} Allowed: {', '.join(words)}"
    if kind == "value_error" and not key:
        message = str(context["error"])
        at = (message.partition(": ")[0],)
        return f"{places.get((*at, 'name'), places.get(at, source))}: {message}"
    if kind == "value_error" and isinstance(got, dict):
        inner = str(context["error"])
        head, _, rest = inner.partition(": ")
        if rest and re.fullmatch(r"\w+", head):
            inner_key = (*key, head)
            return f"{places.get(inner_key, place)}: {dotted(inner_key)}: {rest}"
        return f"{place}: {dotted(key)}: {inner}"
    limits = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    message = error["msg"].removeprefix("Value error, ")
    bounds = _bounds(key, job)
    if kind in limits and bounds:
        message = "must be " + bounds
    elif kind in ("tuple_type", "list_type"):
        message = "must be one number or [height, width]" if key[-1] == "image_size" else "must be a list, [a, b, …]"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "must be keys with values" + (f": {', '.join(sorted(set(fields)))}" if fields else "")
    else:
        message = message[0].lower() + message[1:]
    return f"{place}: {dotted(key)}: {message}; got {got!r}"


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """The recipe sections inside an annotation: unions and Annotated are looked through."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [t for a in get_args(annotation) for t in _section_types(a)]


def _without_tags(loc: Key, job: type[BaseModel]) -> tuple[Key, list[str]]:
    """pydantic puts the chosen component's name into the path; take it out. Also the keys allowed at the end."""
    key: list[str | int] = []
    sections: list[type[BaseModel]] = [job]
    tag = None
    for part in loc:
        names = {s.model_fields["name"].default: s for s in sections if "name" in s.model_fields}
        if len(sections) > 1 and part in names and tag is None:
            sections, tag = [names[part]], part
            continue
        tag = None
        key.append(part)
        inner = [s.model_fields[part] for s in sections if isinstance(part, str) and part in s.model_fields]
        if inner:
            sections = [t for f in inner for t in _section_types(f.annotation)]
        elif part != loc[-1] and not isinstance(part, int):
            key.pop()  # a branch label of a plain union
    return tuple(key), [name for s in sections for name in s.model_fields]


def _leaves(job: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a recipe and its field."""
    found: dict[str, Any] = {}
    for name, f in job.model_fields.items():
        sections = _section_types(f.annotation)
        for s in sections:
            found.update(_leaves(s, f"{prefix}{name}."))
        if not sections:
            found[prefix + name] = f
    return found


def _bounds(key: Key, job: type[BaseModel]) -> str:
    """The numeric limits of a key in words: "> 0 and < 1"."""
    field = _leaves(job).get(dotted(tuple(k for k in key if isinstance(k, str))))
    if field is None:
        return ""
    operators = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found: list[str] = []

    def walk(metadata: Any) -> None:
        for item in metadata:
            for attribute, operator in operators.items():
                if getattr(item, attribute, None) is not None and not isinstance(item, type):
                    found.append(f"{operator} {getattr(item, attribute)}")
            walk(getattr(item, "metadata", ()))

    def annotations(annotation: Any) -> None:
        if get_origin(annotation) is Annotated:
            walk(annotation.__metadata__)
        for a in get_args(annotation):
            annotations(a)

    walk(field.metadata)
    annotations(field.annotation)
    return " and ".join(dict.fromkeys(found))


def json_schema(job: str) -> dict[str, Any]:
    """Of a job's recipes as they are written, with every short form, for editors. It knows no rule between keys."""
    found: dict[str, Any] = _with_limits(RECIPES[job].model_json_schema())
    for section in (found, *found.get("$defs", {}).values()):  # a recipe may leave these to the command line
        if "required" in section:
            section["required"] = [
                key for key in section["required"] if key not in ("shards", "train", "val", "encoder")
            ]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _with_limits(node: Any) -> Any:
    """pydantic leaves the limits of what a function looked at before under its own names, which say nothing there."""
    if isinstance(node, dict):
        return {_LIMITS.get(k, k) if isinstance(v, int | float) else k: _with_limits(v) for k, v in node.items()}
    return [_with_limits(item) for item in node] if isinstance(node, list) else node


def dump_recipe(recipe: Job) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to the same, but for secrets in its URLs."""
    return yaml.safe_dump(_blotted(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _blotted(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _blotted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_blotted(v) for v in value]
    return without_secrets(value) if isinstance(value, str) else value


def settings_of(recipe: Job) -> dict[str, Any]:
    """Values by their dotted keys, for trackers: without the secrets of URLs."""
    return flat_keys(_blotted(recipe.model_dump(mode="json")))


def differences(old: Job, new: Job) -> list[str]:
    """One line for each key that differs and may not change when a run is resumed. A new signature of an URL may."""
    a, b = (settings_of(r) for r in (old, new))
    return [
        f"{key}: was {a.get(key, '(absent)')!r}, now {b.get(key, '(absent)')!r}"
        for key in differing([a, b])
        if key not in MAY_CHANGE and key.split(".")[0] != "probe" and not _is_harmless(key, a.get(key), b.get(key))
    ]


def _is_harmless(key: str, before: Any, now: Any) -> bool:
    """Whether a key that may not change may change so: to more formats of images, which leaves those that were read
    before as they are; or to another folder with an encoder, whose weights are part of the fingerprint."""
    if key == "data.formats":
        return set(before or ()) <= set(now or ())
    return key in ("encoder", "compare") and isinstance(now, str) and os.path.isdir(now)
