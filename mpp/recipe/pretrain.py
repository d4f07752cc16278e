"""The recipe of `mpp pretrain`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mpp.errors import MppWarning
from mpp.recipe import registry
from mpp.recipe.sections import ImageData, Optim, Run, Section, component_section, or_null
from mpp.recipe.values import (
    AreaRange,
    BelowOne,
    Bool,
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
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
    """Unlabeled images: tar shards as a folder, file, pattern (* or {000..099}), URL, or list of these; or a folder of
    images, or a CSV file with a column image. For many images, pack them first with `mpp pack`."""
    crop_scale: AreaRange = (0.2, 1.0)
    """Range of the area of random crops, as a fraction of the image (MAE: 0.2 to 1; SimMIM: 0.67 to 1)."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Range of the aspect ratio of random crops."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of random changes of brightness, contrast and saturation; 0.4 suits agreement. Images of 8 bit only."""
    grayscale: Fraction = 0.0
    """Probability that an image loses its colours; 0.2 suits agreement. Images of 8 bit only."""
    held_out: PositiveInt = 256
    """Number of images to measure the skill on. They are taken from the ends of the shards and never trained on."""
    max_bad_fraction: Fraction = 0.001
    """Largest fraction of unreadable images. The run ends if more images, and at least 100, cannot be read."""
    lanes: PositiveInt = 256
    """Most sequences of shards that are read side by side; see data/order.py. Fewer lanes need less of
    cache_limit_gb."""
    window: PositiveInt = 4096
    """Number of images that are shuffled at a time within a lane."""

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_key(cls, values: object) -> object:
        """Drop the old key `resize_on`, because the loader now always resizes."""
        if not isinstance(values, dict) or "resize_on" not in values:
            return values
        if values["resize_on"] != "cpu":
            warnings.warn("data.resize_on: removed; the loader resizes crops", MppWarning, stacklevel=2)
        return {key: value for key, value in values.items() if key != "resize_on"}


class Encoder(Section):
    """A timm encoder that returns feature maps. `mpp models` lists the families that were tried."""

    name: str = "vit_base_patch16_224"
    """timm name of the encoder; or the folder of a run, an export or an import, whose weights and architecture training
    starts from."""
    args: TimmArgs = {}  # noqa: RUF012 (pydantic copies it)
    """timm arguments of the encoder, such as patch_size, embed_dim, depth, num_heads and drop_path_rate."""
    pretrained: Bool = False
    """Start from timm's published weights of this name."""
    weight_init: Literal["timm", "mae"] = "timm"
    """How random weights are drawn. mae: as MAE's published code does for plain ViTs. Linear layers and the patch
    embedding come from Xavier's uniform distribution, the class token from N(0, 0.02²), and positions are fixed
    sine-cosine."""
    free_blocks: PositiveInt | None = None
    """Train only this many last blocks of the encoder and what follows them. The others keep the weights that training
    starts from. Default: all are trained."""
    grad_checkpointing: Bool = False
    """Recompute activations in the backward pass: slower, but less memory."""

    @property
    def starts_trained(self) -> bool:
        """Whether training starts from weights that were trained before."""
        return self.pretrained or Path(self.name).is_dir()


def _own_loss(values: object) -> object:
    """Fill in the loss if none is named: mse, cross_entropy for classes, or kl for probabilities."""
    if isinstance(values, Mapping) and values.get("loss") is None:
        named = values.get("target")
        name = named.get("name") if isinstance(named, Mapping) else named
        losses = {"classes": "cross_entropy", "probabilities": "kl"}
        fitting = [loss for of, loss in losses.items() if name in registry.named_with("target", of=of)]
        return {**values, "loss": fitting[0] if fitting else "mse"}
    return values


def _fitting_loss(section: Any) -> Any:
    """Check that the loss fits the kind of target: values, classes or probabilities."""
    of = registry.declaration("target", section.target.name).constants["of"]
    fitting = registry.named_with("loss", of=of)
    if section.loss.name not in fitting:
        raise ValueError(
            f"loss: {section.loss.name} is not for {of}, which target {section.target.name} has; "
            f"use one of {', '.join(fitting)}"
        )
    return section


class ExtraTarget(Section):
    """One more target on the same forward pass, with its own head and loss."""

    target: component_section("target", "pixels") = Field({}, validate_default=True)  # type: ignore[valid-type]
    """What this target predicts."""
    loss: component_section("loss", "mse") = Field(None, json_schema_extra=or_null)  # type: ignore[valid-type]
    """Loss of this target. Default: mse, cross_entropy for classes, or kl for probabilities."""
    head: component_section("head", "linear") = Field({}, validate_default=True)  # type: ignore[valid-type]
    """Prediction head of this target."""
    weight: PositiveFloat = 1.0
    """Weight of this target's loss in the sum; the first target's weight is 1."""

    _default_loss = model_validator(mode="before")(_own_loss)
    _loss_fits = model_validator(mode="after")(_fitting_loss)


class OnlineProbe(Section):
    """A linear probe of the encoder during training, on few labeled images. It is a monitor, not evidence."""

    train: Places
    """Labeled images to fit the probe on, as in fine-tuning. The encoder is never trained on them."""
    val: Places
    """Labeled images to judge the probe by, as in fine-tuning."""
    every_steps: PositiveInt = 2000
    """Steps between two probes."""
    images: PositiveInt = 1000
    """Most images of probe.train and of probe.val, drawn by the seed and held in memory. This limits the cost."""
    weight_decay: PositiveFloat = 0.01
    """Weight decay of the probe, as in `mpp evaluate` (a guess)."""


class Agreement(Section):
    """A loss that makes several views of an image agree (LeJEPA, Balestriero & LeCun 2025)."""

    views: Annotated[Int, Field(ge=2)] = 4
    """Views of each image in a step: random crops, each with its own mask. optim.global_batch_size counts views."""
    weight: PositiveFloat = 1.0
    """Weight of this loss in the sum; the first target's weight is 1."""
    dim: PositiveInt = 64
    """Width of the embeddings that agree."""
    hidden_dim: PositiveInt = 512
    """Width of the projector between the encoder and the embeddings. It is not exported."""
    sigreg_weight: Annotated[Float, Field(gt=0, lt=1)] = 0.05
    """Share of SIGReg in this loss. It keeps embeddings apart; the rest pulls the views of an image together."""


class PretrainRecipe(Run):
    """Masked-patch pretraining on unlabeled shards."""

    job: Literal["pretrain"] = "pretrain"
    """The command that runs this recipe."""
    seed: Annotated[NonNegativeInt, Field(lt=2**56)] = 0
    """Seed of the initial weights, the order of the images, crops, masks and everything else that is random."""
    data: PretrainData
    encoder: Encoder = Encoder()
    mask: component_section("mask", "uniform") = Field({}, validate_default=True)  # type: ignore[valid-type]
    """Which patches are hidden."""
    corruption: component_section("corruption", "token") = Field({}, validate_default=True)  # type: ignore[valid-type]
    """What the encoder sees in place of hidden patches."""
    target: component_section("target", "norm_pixels") = Field({}, validate_default=True)  # type: ignore[valid-type]
    """What the model predicts for hidden patches."""
    loss: component_section("loss", "mse") = Field(None, json_schema_extra=or_null)  # type: ignore[valid-type]
    """How far a prediction is from its target. Default: mse, cross_entropy for classes, or kl for probabilities."""
    head: component_section("head", "linear") = Field({}, validate_default=True)  # type: ignore[valid-type]
    """The network that predicts the target from the encoder's features."""
    extra_targets: tuple[ExtraTarget, ...] = ()
    """More targets on the same forward pass: [{target: pixels, head: linear, weight: 0.5}]."""
    agreement: Agreement | None = None
    """Also make pooled features of several crops of an image agree. Set data.color_jitter and data.grayscale as well;
    otherwise colours alone show which crops belong together. The loss compares the images of a micro-batch, so it
    changes with the number of processes and with optim.max_batch_per_device."""
    predict_fraction: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Fraction of the hidden cells to predict."""
    masks_per_image: PositiveInt = 1
    """Masks of each image in a step (data2vec 2.0, Baevski et al. 2023). The encoder gets each image that many times,
    which also needs that many times the memory; the target is computed once. So it is meant for targets that cost much,
    ema_teacher, clusters and teacher, and an encoder that sees only visible patches, corruption: drop."""
    optim: Optim
    ema_decay: BelowOne | None = None
    """Decay of a moving average of the encoder's weights, such as 0.999. The decay is smaller in the first steps. The
    average is probed and exported in place of the last weights; skill and pictures are of the last weights. It is meant
    for optim.schedule: constant, where the last steps still move the weights much."""
    compile: Bool = False
    """Compile the forward and backward pass with torch.compile: about a minute at the start, then 1.03 to 1.2 times as
    fast on a CPU (recipes/LOG.md). Losses differ by rounding. Requires a C++ compiler, on GPUs Triton."""
    fsdp: Bool = False
    """Shard weights, gradients and optimizer state across GPUs (FSDP2), for encoders that do not fit on one GPU. Also
    set encoder.grad_checkpointing. The host needs memory for a whole copy of the weights (with ema_decay, also of the
    averaged encoder), and each GPU for evaluating and exporting it. Checkpoints are written in parts."""
    skill_every_steps: PositiveInt = 500
    """Steps between two measurements of the skill on held-out images."""
    reconstruct_images: NonNegativeInt = 6
    """Number of held-out images whose reconstructions are stored during training, if the target has a picture. 0:
    none."""
    probe: OnlineProbe | None = None
    """Measure a linear probe of the encoder during training. It does not change training. If training starts from
    trained weights, a warning says when the encoder is worse than these."""

    _default_loss = model_validator(mode="before")(_own_loss)
    _loss_fits = model_validator(mode="after")(_fitting_loss)

    @model_validator(mode="after")
    def _colours(self) -> Self:
        sections: tuple[PretrainRecipe | ExtraTarget, ...] = (self, *self.extra_targets)
        for section in sections:
            if not self.data.eight_bit and section.target.name in registry.named_with("target", of="classes"):
                fitting = (name for of in ("values", "probabilities") for name in registry.named_with("target", of=of))
                allowed = ", ".join(sorted(fitting))
                raise ValueError(
                    f"target: {section.target.name} takes classes from pixels of 8 bit; with data.value_range, or "
                    f"channels other than 1, 3 and 4, use one of {allowed}"
                )
        return self

    @model_validator(mode="after")
    def _views(self) -> Self:
        if self.agreement and self.masks_per_image > 1:
            raise ValueError("masks_per_image: cannot be combined with agreement, whose views have a mask each; use 1")
        for key in ("color_jitter", "grayscale"):
            if getattr(self.data, key) and not self.data.eight_bit:
                raise ValueError(f"data.{key}: for images of 8 bit with 1, 3 or 4 channels; use 0")
        return self

    @property
    def views(self) -> int:
        """Number of samples that are views of one image."""
        return self.agreement.views if self.agreement else 1

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.fsdp and self.optim.name == "muon":
            raise ValueError("optim.name: muon needs whole matrices, which fsdp: true divides; use adamw")
        if self.compile and self.fsdp:
            raise ValueError("compile: cannot be combined with fsdp: true")
        return self
