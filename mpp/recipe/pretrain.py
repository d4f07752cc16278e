"""The recipe of `mpp pretrain`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mpp.errors import MppWarning
from mpp.recipe import registry
from mpp.recipe.sections import ImageData, Optim, Run, Section, component_section, or_null
from mpp.recipe.values import (
    AreaRange,
    Bool,
    Float,
    Fraction,
    NonNegativeInt,
    Places,
    PositiveFloat,
    PositiveInt,
    Range,
    TimmArgs,
)


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
    def _drop_removed_key(cls, values: object) -> object:
        """Drop `resize_on` from recipes that were written while it existed: the loader resizes now."""
        if not isinstance(values, dict) or "resize_on" not in values:
            return values
        if values["resize_on"] != "cpu":
            warnings.warn("data.resize_on: removed; the loader resizes crops", MppWarning, stacklevel=2)
        return {key: value for key, value in values.items() if key != "resize_on"}


class Encoder(Section):
    """Any timm encoder with a map of features; `mpp models` lists the families that were tried."""

    name: str = "vit_base_patch16_224"
    """Name of the timm model; or the folder of a run or an export, such as `mpp import` makes, whose weights and
    architecture it starts from."""
    args: TimmArgs = {}  # noqa: RUF012 (pydantic copies it)
    """timm's arguments for it, such as patch_size, embed_dim, depth, num_heads, drop_path_rate."""
    pretrained: Bool = False
    """Start from timm's published weights of this name."""
    weight_init: Literal["timm", "mae"] = "timm"
    """How random weights are drawn. mae: as MAE's published code does for plain ViTs: linear layers and patch embedding
    from Xavier's uniform distribution, the class token from N(0, 0.02²), fixed sine-cosine positions."""
    grad_checkpointing: Bool = False
    """Recompute activations in the backward pass: slower, less memory."""


def _own_loss(values: object) -> object:
    """Where no loss is named: mse, or cross_entropy for a target of classes."""
    if isinstance(values, Mapping) and values.get("loss") is None:
        named = values.get("target")
        name = named.get("name") if isinstance(named, Mapping) else named
        classes = name in registry.named_with("target", of="classes")
        return {**values, "loss": "cross_entropy" if classes else "mse"}
    return values


def _fitting_loss(section: Any) -> Any:
    """Values are compared by distances, classes by cross-entropy."""
    of = registry.declaration("target", section.target.name).constants["of"]
    fitting = registry.named_with("loss", of=of)
    if section.loss.name not in fitting:
        raise ValueError(
            f"loss: {section.loss.name} is not for {of}, which target {section.target.name} has; "
            f"allowed with it: {', '.join(fitting)}"
        )
    return section


class ExtraTarget(Section):
    """One more target on the same forward, with a head and a loss of its own."""

    target: component_section("target", "pixels") = Field({}, validate_default=True)  # type: ignore[valid-type]
    loss: component_section("loss", "mse") = Field(None, json_schema_extra=or_null)  # type: ignore[valid-type]
    """Default: mse, or cross_entropy for a target of classes."""
    head: component_section("head", "linear") = Field({}, validate_default=True)  # type: ignore[valid-type]
    weight: PositiveFloat = 1.0
    """Of its loss in the sum; the first target's is 1."""

    _default_loss = model_validator(mode="before")(_own_loss)
    _loss_fits = model_validator(mode="after")(_fitting_loss)


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
    mask: component_section("mask", "uniform") = Field({}, validate_default=True)  # type: ignore[valid-type]
    corruption: component_section("corruption", "token") = Field({}, validate_default=True)  # type: ignore[valid-type]
    target: component_section("target", "norm_pixels") = Field({}, validate_default=True)  # type: ignore[valid-type]
    loss: component_section("loss", "mse") = Field(None, json_schema_extra=or_null)  # type: ignore[valid-type]
    """Default: mse, or cross_entropy for a target of classes."""
    head: component_section("head", "linear") = Field({}, validate_default=True)  # type: ignore[valid-type]
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
        sections: tuple[PretrainRecipe | ExtraTarget, ...] = (self, *self.extra_targets)
        for section in sections:
            if not self.data.eight_bit and section.target.name in registry.named_with("target", of="classes"):
                allowed = ", ".join(registry.named_with("target", of="values"))
                raise ValueError(
                    f"target: {section.target.name} takes classes from pixels of 8 bit; with data.value_range, or "
                    f"channels other than 1, 3 and 4, allowed are {allowed}"
                )
        return self

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.compile and self.fsdp:
            raise ValueError("compile: not together with fsdp: true, whose gathering it cannot follow")
        return self
