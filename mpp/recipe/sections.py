"""Recipe sections that several jobs share (images, optimizer, runs), and sections that name a component."""

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
    FORMATS,
    MOST_CHANNELS,
    BelowOne,
    Device,
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
    """A part of a recipe. Unknown keys are errors, and values cannot change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Chosen(Section):
    """A component that is not the default of its key, so its name must be given."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.setdefault("required", []).append("name"))


class _ByName:
    """JSON schema of a component: either its name, or a mapping of its keys."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonObject:
        sections = handler(core)
        # anyOf, because with oneOf an editor shows the errors of every component for a key that fits none of them
        return {"anyOf": [{"enum": self.names}, *sections.get("oneOf", [sections])]}


def component_section(kind: str, default: str) -> Any:
    """Return the type of a recipe key that names a component: `{name: block, ratio: 0.4}`, or only `block`.

    The other keys are the component's keyword-only constructor arguments, checked against their annotations.

    Args:
        kind: Kind of component, see `registry.KINDS`.
        default: Name of the default component.
    """
    sections = []
    for name in registry.names(kind):
        component = registry.declaration(kind, name)
        fields: JsonObject = {
            key: (argument.annotation, Field(argument.default, description=argument.description))
            for key, argument in component.arguments.items()
        }
        fields["name"] = (Literal[name], Field(name, description=f"Which {kind} it is."))
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
"""Pixel values that become 0 and 1 in images that are not read as 8 bit. "type" means 0 and the largest number of the
pixel type."""


class Reading(TypedDict):
    """Keyword arguments of functions that read the pixels of an image."""

    channels: int
    formats: tuple[str, ...]
    max_image_pixels: int


class Decoding(Reading):
    """Keyword arguments of functions that decode images."""

    value_range: NotRequired[ValueRange | None]
    """Pixel range of images that are not read as 8 bit."""
    nodata: NotRequired[float | None]


class Opening(TypedDict):
    """Keyword arguments of functions that open shards."""

    cache_dir: str | None
    cache_limit_bytes: float
    image_extension: str | None


class ImageData(Section):
    """Settings for reading images, in every job."""

    image_size: ImageSize
    """Side of the training crops in pixels, or [height, width]."""
    channels: Annotated[PositiveInt, Field(le=MOST_CHANNELS)] = 3
    """Channels of the images. 1: grey, 3: RGB, 4: RGBA. Any other number: TIFF and .npy files with that many channels,
    first or last."""
    value_range: Annotated[tuple[Float, Float], AfterValidator(growing)] | None = None
    """Pixel range [low, high] of images that are not 8-bit, for example [0, 10000]. Values are scaled so that low is 0
    and high is 1, and clipped. Default: the encoder's range; else 8-bit for 1, 3 or 4 channels; else from 0 to the
    largest number of integer types, and [0, 1] for floating point."""
    nodata: Float | None = None
    """Value of missing pixels in images that are not 8-bit, for example -9999; TIFF files may name it themselves.
    Missing pixels and NaN become the mean of their channel. If more than half of an image is missing, it counts as
    unreadable."""
    mean: tuple[Fraction, ...] | None = None
    """Mean of each channel, for pixels in [0, 1]. Default: that of the weights the encoder starts from, else 0.5."""
    std: tuple[Annotated[PositiveFloat, Field(le=1)], ...] | None = None
    """Standard deviation of each channel, for pixels in [0, 1]. Default: as mean."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip in training."""
    workers: NonNegativeInt = 2
    """Loader processes of each training process. 0: images are read in the training process itself."""
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = FORMATS
    """Image formats to decode. Files of other formats count as unreadable."""
    max_image_pixels: Annotated[PositiveInt, Field(le=178_000_000)] = 64_000_000
    """Images with more pixels count as unreadable; only their header is read."""
    image_extension: ImageExtension | None = None
    """Which image of a tar sample to read, if a sample has several: rgb.png reads 7.rgb.png and not 7.depth.png.
    Default: every image whose name does not begin with the name of another."""
    cache_dir: FilePath | None = None
    """Folder for downloaded shards and for indexes of read-only shards. Default: $MPP_CACHE, else ~/.cache/mpp."""
    cache_limit_gb: PositiveFloat = 200.0
    """Most gigabytes of downloaded shards to keep. The least recently used ones are deleted and downloaded again when
    needed."""

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
        """Return the keyword arguments for functions that decode images."""
        decoding: Decoding = {
            "channels": self.channels,
            "formats": self.formats,
            "max_image_pixels": self.max_image_pixels,
        }
        if not self.eight_bit:
            decoding["value_range"], decoding["nodata"] = self.value_range or "type", self.nodata
        return decoding

    def opening(self) -> Opening:
        """Return the keyword arguments for functions that open shards."""
        return {
            "cache_dir": self.cache_dir,
            "cache_limit_bytes": self.cache_limit_gb * 1e9,
            "image_extension": self.image_extension,
        }

    def mean_std(self) -> tuple[list[float], list[float]]:
        return list(self.mean or [0.5] * self.channels), list(self.std or [0.5] * self.channels)


DECODING = {key: ImageData.model_fields[key].default for key in ("formats", "max_image_pixels")}
"""Decoding of images that are read without a recipe: the defaults of recipes."""


def or_null(schema: JsonObject) -> None:
    schema["anyOf"].append({"type": "null"})


class Optim(Section):
    """Optimizer, and learning-rate schedule with linear warm-up."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw, or sgd with Nesterov momentum of 0.9. SGD needs a higher base_lr (0.2) and a lower weight_decay (1e-3),
    which it adds to the gradient. Convolutional networks learn better with it from scratch. muon (Jordan et al. 2024)
    takes AdamW's rates. It orthogonalises the updates of the matrices in the encoder's blocks, in fp32 on CPUs and in
    bf16 elsewhere, which makes steps of small models a tenth to a quarter longer."""
    base_lr: PositiveFloat = 1.5e-4
    """Learning rate for a batch of 256 images, multiplied by global_batch_size / 256 (Goyal et al. 2017). MAE:
    1.5e-4."""
    global_batch_size: PositiveInt = 256
    """Images of one optimizer step, over all processes and accumulated micro-batches. Each view of agreement counts."""
    max_batch_per_device: PositiveInt = 256
    """Most images, or views of agreement, in the memory of a device at once. Larger batches are accumulated from
    micro-batches."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; not applied to norms, biases, tokens and position embeddings."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay rates of the two moments of AdamW, which also trains what muon does not."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest norm of the gradient; longer gradients are scaled down to it. Default: no limit."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Length of the linear warm-up of the learning rate, in epochs."""
    warmup_steps: NonNegativeInt | None = None
    """Length of the warm-up in steps. It replaces warmup_epochs."""
    epochs: PositiveFloat | None = None
    """Length of training in passes over the images. Give either epochs or steps. On the command line, each of them
    replaces both of the recipe."""
    steps: PositiveInt | None = None
    """Length of training in optimizer steps. Give either epochs or steps."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up. cosine: half a cosine. wsd: constant, and falling in the last fifth as 1 - sqrt
    (Hägele et al. 2024). constant: constant. Pretraining with wsd or constant can be made longer afterwards: repeat the
    command with more steps and --resume auto."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule, for 256 images like base_lr."""

    @model_validator(mode="after")
    def _length(self) -> Optim:
        if (self.epochs is None) == (self.steps is None):
            both = ", not both; epochs: null or steps: null takes one away"
            raise ValueError("epochs: give one of epochs and steps" + ("" if self.steps is None else both))
        if self.min_lr and self.schedule == "constant":
            raise ValueError("min_lr: the rate of schedule: constant does not fall; leave out min_lr")
        return self


class Job(Section):
    """Keys of every job."""

    job: str
    """Which command the recipe is for: pretrain, finetune or evaluate."""
    out: FilePath
    """Run folder. It must be new or empty, unless you resume the run."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA devices that support it, else fp32. tf32: fp32 with 10-bit mantissas in matrix
    products, on CUDA devices that support it."""
    device: Device = "auto"
    """Where to compute: auto (CUDA where there is a device, else the CPU), cpu, cuda, cuda:1 (the second GPU), or mps
    for Apple's GPUs, which nobody has tried."""
    presets: dict[str, JsonObject] = {}
    """Named sets of overrides, for example tiny: {optim.steps: 3}. `--preset tiny` applies one. Older recipes call this
    key scales."""


class Run(Job):
    """Keys of the jobs that train."""

    devices: PositiveInt = 1
    """Number of devices of this machine to use. The command starts one process for each, as torchrun would. If a
    launcher started the command, this key has no effect."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of the log."""
    checkpoint_every_steps: PositiveInt = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted. optim.schedule: wsd keeps one more."""
    if_unsaved: Literal["stop", "go_on"] = "stop"
    """What to do if a checkpoint cannot be written, for example because the disk is full. stop: end the run. go_on:
    warn, and try again at the next checkpoint. If the last checkpoint of a run cannot be written, the run
    always ends. Earlier checkpoints stay in
    either case."""
    max_skipped_steps: NonNegativeInt = 0
    """Number of steps with a NaN or infinite loss or gradient to skip before such a step ends the run."""
    hang_timeout_s: Annotated[PositiveFloat, Field(ge=5, le=1e9)] = 1800.0
    """Seconds without progress after which a process counts as hung and the run ends. Reading a batch and saving a
    checkpoint must fit into this time (default: a guess)."""
    trackers: Annotated[
        tuple[Tracker, ...], BeforeValidator(listed, json_schema_input_type=Tracker | tuple[Tracker, ...])
    ] = ()
    """Where else to send the metrics: tensorboard, wandb, trackio or mlflow. Each requires its package."""

    @model_validator(mode="after")
    def _one_of_several_devices(self) -> Self:
        if self.devices > 1 and ":" in self.device:
            raise ValueError(f"devices: {self.devices}: {self.device} is a single device; use device=cuda")
        return self


class LabeledData(ImageData):
    """Labeled images: a folder with a folder for each class, shards with labels, or a CSV file (image,label)."""

    train: Places
    """Labeled training images: a folder with a subfolder for each class, packed shards, or a CSV file (image,label)."""
    val: Places
    """Labeled validation images, in the same form as data.train."""
    labels_per_class: PositiveInt | None = None
    """Train on this many images of each class, drawn by the seed."""
    fraction: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Train on this fraction of each class, drawn by the seed; at least one image of each."""
    max_bad_fraction: Fraction = 0.05
    """Largest fraction of unreadable images among those checked before the start. If more are unreadable, and at least
    2, nothing is trained."""
    val_crop_fraction: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Side of the central crop that validation images are cut to, as a fraction of the image (ImageNet recipes:
    0.875)."""

    @model_validator(mode="after")
    def _subset(self) -> Self:
        if self.labels_per_class is not None and self.fraction is not None:
            raise ValueError("give labels_per_class or fraction, not both")
        return self


class Architecture(Section):
    """Which timm encoder to build, or arguments for the one that `encoder` names."""

    name: str | None = None
    """timm name of the encoder to build; only with encoder: scratch."""
    args: TimmArgs = {}
    """timm arguments of the encoder. For a run or an export they change its own, for example window_size: 7 for a Swin
    that was pretrained with windows of 6 at 192 px."""
