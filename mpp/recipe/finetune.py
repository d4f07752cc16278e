"""The recipe of `mpp finetune`."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mpp.recipe import registry
from mpp.recipe.sections import Architecture, LabeledData, Optim, Run, Section, component_section
from mpp.recipe.values import (
    AreaRange,
    BelowOne,
    Bool,
    FilePath,
    Float,
    Fraction,
    ImageSize,
    LabelCounts,
    NonNegativeFloat,
    NonNegativeInt,
    Places,
    PositiveFloat,
    PositiveInt,
    Range,
    TimmArgs,
    each_once,
    listed,
    no_bool,
)


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

    @model_validator(mode="after")
    def _augmentations_of_colours(self) -> Self:
        for key, value in (("auto_augment", self.auto_augment), ("color_jitter", self.color_jitter)):
            if value and not self.eight_bit:
                allowed = "only for images of 8 bit with 1, 3 or 4 channels, without value_range"
                raise ValueError(f"{key}: {allowed}; data.{key}=null leaves it out")
        return self

    def label_counts(self) -> tuple[int | None, ...]:
        """Labels of each class, from few to many; None: as many as there are, or a fraction."""
        return tuple(sorted(self.labels_per_class)) if self.labels_per_class else (None,)


class FinetuneOptim(Optim):
    """As in pretraining, and what fine-tuning adds."""

    base_lr: PositiveFloat = 5e-4
    """For 256 images (MAE, table 9: 5e-4 for ViT-L/H, 5e-4 for ViT-B)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    layer_decay: Annotated[Float, Field(gt=0, le=1)] = 0.75
    """Learning rate of a layer over that of the next (BEiT; MAE: 0.75). The scratch arm uses 1."""
    head_lr_scale: PositiveFloat = 1.0
    """Learning rate of the new head over that of the last layer."""


Beside: TypeAlias = Literal["scratch", "cnn", "published"]


class Scratch(Section):
    """What the arm from scratch does otherwise; None: as the pretrained arm."""

    base_lr: PositiveFloat | None = None
    layer_decay: Annotated[Float, Field(gt=0, le=1)] | None = 1.0
    """1: layer decay protects pretrained layers, and there are none."""
    frozen: Fraction | None = 0.0
    """0: nothing is worth standing still for."""


class Cnn(Section):
    """The convolutional network of `beside: [cnn]`: what somebody without unlabeled images would train.

    It begins from scratch and gets the time that the encoder took, pretraining included. Everything that is not said
    here it does as the fine-tune does.
    """

    name: str | None = None
    """timm's; default: resnet18d, of half the width, for images below 128 px, resnet18 above."""
    args: TimmArgs = {}  # noqa: RUF012 (pydantic copies it)
    """timm's arguments of that model."""
    image_size: ImageSize | None = None
    """Side in pixels, or [height, width]: small images are enlarged for networks whose first layers halve them twice.
    Default: twice that of the images below 48 px, else their own."""
    optimizer: Literal["adamw", "sgd"] = "sgd"
    """As optim.name."""
    base_lr: PositiveFloat = 0.2
    weight_decay: NonNegativeFloat = 1e-3
    max_epochs: PositiveFloat = 1000.0
    """It trains no longer than so many passes, even if it has more time: nothing rises any more by then."""


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
    images: Places | None = None
    """Shards or folders of images without labels, from which the teacher teaches, too, as large models teach small ones
    (Chen et al. 2020, section 2.3). Validation images among them are left out."""
    per_label: PositiveInt = 3
    """Of these images to each labeled one of a step."""


class Unlabeled(Section):
    """Images without labels in fine-tuning (FixMatch, Sohn et al. 2020).

    A moving average of the model looks at a weak view of each. Where it is sure, the model learns what it says, in a
    strong view.
    """

    images: Places
    """Shards, or folders of images, as pretraining reads them. Validation images among them are left out."""
    per_label: PositiveInt = 3
    """Unlabeled images to each labeled one of a step (FixMatch: 7)."""
    weight: PositiveFloat = 1.0
    """Of their loss beside that of the labeled ones (FixMatch: 1)."""
    warmup: Fraction = 0.1
    """Part of the steps in which the weight rises from 0 (a guess)."""
    threshold: Annotated[Float, Field(gt=0, lt=1)] = 0.95
    """Least probability of what is learned (FixMatch: 0.95). Of several classes that an image may have, each is learned
    where it is as sure to be there, or not to be."""
    weak_crop_scale: AreaRange = (0.75, 1.0)
    """Range of the area of the weak view, which is mirrored half of the time (a guess)."""
    auto_augment: str | None = "rand-m10-n2-mstd0.5-inc1"
    """timm's policy of the strong view, on crops as labeled images have them (FixMatch: RandAugment)."""
    erase: Fraction = 1.0
    """Probability of random erasing in the strong view (FixMatch: Cutout, always)."""


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
    beside: Annotated[
        tuple[Beside, ...],
        BeforeValidator(listed, json_schema_input_type=Beside | tuple[Beside, ...]),
        AfterValidator(each_once),
    ] = ("scratch",)
    """What the fine-tune is compared with. scratch: the same from random weights. cnn: a convolutional network from
    scratch, for the same time, pretraining included, see `cnn`. published: the same from the weights that timm has for
    this encoder. []: nothing."""
    seeds: Annotated[
        tuple[Annotated[NonNegativeInt, Field(lt=2**56)], ...], Field(min_length=1), AfterValidator(each_once)
    ] = (0, 1, 2)
    """Each draws its own labels, order and initial head."""
    data: FinetuneData
    task: component_section("task", "classify") = Field({}, validate_default=True)  # type: ignore[valid-type]
    pool: Literal["mean", "token", "attention"] = "mean"
    """Features of an image: the mean of its patch tokens, the class token, or what a new attention layer with one query
    reads from all tokens (timm's, of ViTs; Zhai et al. 2022, section 3.2, who call it MAP). Pretraining trains the
    class token's last output only with the heads transformer and cross_attention."""
    fc_norm: Bool | None = None
    """With `pool: mean`. true: norm the mean by a new norm, in place of the encoder's final one, as MAE's fine-tuning
    does. false: norm each token by the encoder's final norm, then take the mean. Default: as the encoder has it."""
    drop_path_rate: BelowOne = 0.0
    mixup: NonNegativeFloat = 0.0
    """Alpha of the beta distribution (Zhang et al. 2018); 0: none."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of the beta distribution (Yun et al. 2019); 0: none."""
    head_init: Literal["zero", "probe"] = "zero"
    """How the new head begins. zero: next to zero, so that all classes are equally likely. probe: as a linear probe,
    fitted to the frozen encoder's features of the training images (LP-FT, Kumar et al. 2022); what that start is worth
    is measured, too. From scratch it is always zero."""
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
    """Learn from a teacher, too; all arms do but the CNN."""
    unlabeled: Unlabeled | None = None
    """Learn from images without labels, too: `unlabeled={images: shards/photos}`. All arms do but the CNN."""
    optim: FinetuneOptim
    scratch: Scratch = Scratch()
    cnn: Cnn = Cnn()

    @model_validator(mode="before")
    @classmethod
    def _beside(cls, values: object) -> object:
        """Read recipes that were written while `beside` was `beside_scratch: true` or `false`."""
        if not isinstance(values, dict) or "beside_scratch" not in values:
            return values
        if "beside" in values:
            raise ValueError("beside_scratch: is called beside now, which is given, too; leave this one out")
        rest = {key: value for key, value in values.items() if key != "beside_scratch"}
        return {**rest, "beside": ["scratch"] if values["beside_scratch"] else []}

    @model_validator(mode="after")
    def _architecture(self) -> FinetuneRecipe:
        named = self.architecture and self.architecture.name
        if self.encoder == "scratch" and not named:
            raise ValueError("encoder: scratch needs architecture.name, a name of timm's")
        if self.encoder == "scratch" and "published" in self.beside:
            raise ValueError("beside: published: not with encoder: scratch; encoder=NAME takes timm's weights itself")
        if self.fc_norm and self.pool != "mean":
            raise ValueError(f"fc_norm: norms the mean of the patch tokens; not with pool: {self.pool}")
        if self.pool == "attention" and (self.frozen or self.lora or self.head_init == "probe"):
            raise ValueError(
                "pool: attention: learns from the first step on; not with frozen, lora or head_init: probe"
            )
        if self.unfreeze == "gradual" and not 0 < self.frozen < 1:
            raise ValueError("unfreeze: gradual: wants `frozen` between 0 and 1, the part of the steps that it takes")
        if self.lora and self.frozen == 1:
            raise ValueError("lora: its adapters are in the encoder, which `frozen: 1` keeps as it is")
        if self.lora and self.encoder == "scratch":
            raise ValueError("lora: with encoder: scratch there is nothing to adapt")
        if self.unlabeled and self.distill:
            raise ValueError("unlabeled: not with distill: two teachers")
        if self.unlabeled and not self.ema_decay:
            raise ValueError("unlabeled: learns from a moving average of the weights; give ema_decay, such as 0.999")
        side_px = self.data.val_side_px
        if side_px is not None and side_px < min(self.data.image_size):
            raise ValueError(f"data: val_side_px: at least the shorter of image_size, {min(self.data.image_size)}")
        return self

    @model_validator(mode="after")
    def _kind_of_label(self) -> Self:
        """Compare with what the kind of label allows that the task learns from."""
        kind = registry.declaration("task", self.task.name).constants["labels"]
        constants = registry.declaration("labels", kind).constants
        if constants.get("eight_bit_only") and not self.data.eight_bit:
            raise ValueError(f"task: {self.task.name}: only for images of 8 bit with 1, 3 or 4 channels")
        for key, allowed in constants.get("allowed_values", {}).items():
            if reduce(getattr, key.split("."), self) not in allowed:
                instead = "; allowed: data.fraction" if key == "data.labels_per_class" else ""
                section, _, rest = key.rpartition(".")
                where = f"{section}: {rest}" if section else rest
                raise ValueError(f"{where}: not with task: {self.task.name}{instead}")
        return self
