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
    """Labeled images and their augmentation. By default, `mean` and `std` are those of the encoder."""

    labels_per_class: LabelCounts | None = None  # type: ignore[assignment]
    """Train on this many images of each class, drawn by the seed. A list, [10, 100, 500], trains every setting."""
    crop_scale: AreaRange = (0.08, 1.0)
    """Range of the area of random crops, as a fraction of the image."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Range of the aspect ratio of random crops."""
    auto_augment: str | None = None
    """timm policy string, for example rand-m9-mstd0.5-inc1 (RandAugment). Default: none."""
    color_jitter: NonNegativeFloat | None = None
    """Strength of random changes of brightness, contrast and saturation. Default: none."""
    erase: Fraction = 0.0
    """Probability of random erasing (Zhong et al. 2020)."""
    val_views: Annotated[Literal[1, 2, 10], BeforeValidator(no_bool)] = 1
    """Views of a validation image to average. 1: centre; 2: adds a mirror image; 10: adds corners (Krizhevsky et al.
    2012, section 4.1)."""
    val_side_px: PositiveInt | None = None
    """With task: segment: shorter side in pixels to which validation images are scaled before they are read in
    overlapping windows of image_size. Default: the shorter side of image_size."""

    @model_validator(mode="after")
    def _augmentations_of_colours(self) -> Self:
        for key, value in (("auto_augment", self.auto_augment), ("color_jitter", self.color_jitter)):
            if value and not self.eight_bit:
                allowed = "only for images of 8 bit with 1, 3 or 4 channels, without value_range"
                raise ValueError(f"{key}: {allowed}; data.{key}=null leaves it out")
        return self

    def label_counts(self) -> tuple[int | None, ...]:
        """Return the numbers of labels per class, ascending. None means all labels, or `fraction` of them."""
        return tuple(sorted(self.labels_per_class)) if self.labels_per_class else (None,)


class FinetuneOptim(Optim):
    """Optimizer, warm-up and schedule as in pretraining, with keys that only fine-tuning has."""

    base_lr: PositiveFloat = 5e-4
    """Learning rate for a batch of 256 images, multiplied by global_batch_size / 256 (MAE, table 9: 5e-4 for ViT-B and
    ViT-L)."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    min_steps: NonNegativeInt = 0
    """Least number of steps, used if epochs gives fewer. The epochs of the warm-up become longer in proportion."""
    layer_decay: Annotated[Float, Field(gt=0, le=1)] = 0.75
    """Learning rate of a layer divided by that of the next layer (BEiT; MAE: 0.75). Training from scratch uses 1."""
    head_lr_scale: PositiveFloat = 1.0
    """Learning rate of the new head divided by that of the last layer."""


Beside: TypeAlias = Literal["scratch", "cnn", "published"]


class Scratch(Section):
    """Settings of the approach from scratch. null means the same as for the pretrained approach."""

    base_lr: PositiveFloat | None = None
    """Learning rate from scratch. Default: as optim.base_lr."""
    layer_decay: Annotated[Float, Field(gt=0, le=1)] | None = 1.0
    """Layer decay from scratch. 1: none, as there are no pretrained layers to protect."""
    frozen: Fraction | None = 0.0
    """As the key frozen, from scratch. 0: everything learns from the first step."""


class Cnn(Section):
    """The convolutional network of `beside: [cnn]`: what somebody without unlabeled images would train.

    It starts from scratch and trains for the time that the encoder took, including pretraining. All settings without a
    key here are those of the fine-tune.
    """

    name: str | None = None
    """timm name of the network. Default: resnet18d of half the width for images below 128 px, else resnet18."""
    args: TimmArgs = {}  # noqa: RUF012 (pydantic copies it)
    """timm arguments of the network."""
    image_size: ImageSize | None = None
    """Side of its images in pixels, or [height, width]. Default: image_size, doubled below 48 px, because the first
    layers of the network halve the image twice."""
    optimizer: Literal["adamw", "sgd", "muon"] = "sgd"
    """Optimizer of the network, as optim.name."""
    base_lr: PositiveFloat = 0.2
    """Learning rate of the network for a batch of 256 images."""
    weight_decay: NonNegativeFloat = 1e-3
    """Weight decay of the network."""
    max_epochs: PositiveFloat = 1000.0
    """Most passes over the training images, even if there is time for more. Accuracy no longer rises by then."""


class Distill(Section):
    """A teacher whose predictions are learned in addition to the labels (DeiT, Touvron et al. 2021, section 4).

    An encoder with a distillation token (`deit_*_distilled_*`) learns from the teacher there, any other through its one
    head.
    """

    teacher: Places
    """Folder of a fine-tuned model (runs/a/pretrained-seed0), its export, or a timm name, with a classifier of the same
    classes. Of a list, the mean of the probabilities is learned."""
    kind: Literal["hard", "soft"] = "hard"
    """hard: the teacher's likeliest class is a second label. soft: its probabilities are."""
    alpha: Fraction = 0.5
    """The teacher's share of the loss (DeiT: 0.5 with hard, 0.1 with soft)."""
    temperature: PositiveFloat = 3.0
    """Temperature of soft labels (DeiT: 3)."""
    images: Places | None = None
    """Unlabeled images for the teacher to label, as shards or folders (Chen et al. 2020, section 2.3). They are
    augmented and mixed like labeled ones. Validation images among them are left out. Default: none."""
    per_label: PositiveInt = 3
    """Number of these images for each labeled image of a step."""


class Unlabeled(Section):
    """Images without labels in fine-tuning.

    A moving average of the model predicts a weakly augmented view of each image. The model learns the prediction on a
    strongly augmented view.
    """

    images: Places
    """Unlabeled images, as shards or folders. Validation images among them are left out."""
    kind: Literal["fixmatch", "mixmatch"] = "fixmatch"
    """fixmatch: only confident predictions are learned, as classes (Sohn et al. 2020). mixmatch: the probabilities of
    all images are learned, sharpened; mixup and cutmix mix them with labeled images (Berthelot et al. 2019)."""
    per_label: PositiveInt = 3
    """Number of unlabeled images for each labeled image of a step (FixMatch: 7). They are in the memory of the device
    in addition to optim.max_batch_per_device labeled images."""
    weight: PositiveFloat = 1.0
    """Weight of the loss of unlabeled images; labeled images have weight 1 (FixMatch: 1)."""
    start: BelowOne = 0.0
    """Fraction of the steps that train on labeled images alone, before unlabeled ones are added. Steps on labeled
    images alone are several times faster. With mixmatch, 0.1 is a good guess."""
    warmup: Fraction = 0.1
    """Fraction of the steps during which the weight rises from 0, from `start` on (a guess)."""
    threshold: Annotated[Float, Field(gt=0, lt=1)] = 0.95
    """With kind: fixmatch, the least probability at which the averaged model's class is learned (FixMatch: 0.95). If an
    image may have several classes, each class is learned if it is as surely present or absent."""
    temperature: Annotated[Float, Field(gt=0, le=1)] = 0.5
    """With kind: mixmatch, the temperature of the probabilities that are learned. They are raised to the power
    1 / temperature (MixMatch: 0.5). 1 leaves them as they are."""
    align: Bool = True
    """With kind: mixmatch, whether predictions are aligned with the class frequencies of data.train, so that no class
    crowds out the others (Berthelot et al. 2020). Give false if the unlabeled images have other class frequencies."""
    weak_crop_scale: AreaRange = (0.75, 1.0)
    """Range of the area of the weak view's crop, as a fraction of the image (a guess). data.flip mirrors it."""
    auto_augment: str | None = "rand-m10-n2-mstd0.5-inc1"
    """timm policy string of the strong view, on crops like those of labeled images (FixMatch: RandAugment). Images with
    more than 8 bits are only cropped and erased."""
    erase: Fraction = 1.0
    """Probability of random erasing in the strong view (FixMatch: cutout, always)."""


class Lora(Section):
    """Low-rank adapters (LoRA, Hu et al. 2022), trained in place of the encoder's own weights, which stay frozen.

    Requires the package peft. Adapters are merged into the weights at the end, so the export is a plain encoder. The
    approach from scratch has no adapters, because random weights are not worth freezing.
    """

    rank: PositiveInt = 8
    """Rank of the adapters."""
    alpha: PositiveInt = 16
    """Scale of the adapters, times rank (a guess: twice the rank)."""
    dropout: BelowOne = 0.0
    """Dropout on the input of the adapters."""


class EarlyStop(Section):
    """Measure the score on held-out training images, stop when it no longer rises, and return to the best weights.

    The validation images are not used for this.
    """

    fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the training images of each class to judge by instead of training on it. `unlabeled` may contain the
    same images, without their labels."""
    every_steps: PositiveInt = 100
    """Steps between two measurements."""
    patience: PositiveInt = 5
    """Measurements without a new best before training stops."""


class FinetuneRecipe(Run):
    """Fine-tuning on labeled images, compared with baselines."""

    job: Literal["finetune"] = "finetune"
    """The command that runs this recipe."""
    encoder: FilePath
    """Encoder to fine-tune: the folder of a pretraining run or an export, a timm name, or scratch."""
    architecture: Architecture | None = None
    """Which encoder to build with encoder: scratch, or changed arguments of the given encoder."""
    beside: Annotated[
        tuple[Beside, ...],
        BeforeValidator(listed, json_schema_input_type=Beside | tuple[Beside, ...]),
        AfterValidator(each_once),
    ] = ("scratch",)
    """Baselines to compare with. scratch: the same encoder from random weights. cnn: a convolutional network from
    scratch for the same time, including pretraining; see cnn. published: the same encoder with timm's weights. []:
    none."""
    seeds: Annotated[
        tuple[Annotated[NonNegativeInt, Field(lt=2**56)], ...], Field(min_length=1), AfterValidator(each_once)
    ] = (0, 1, 2)
    """Seeds to train. Each draws its own labels, order and initial head."""
    data: FinetuneData
    task: component_section("task", "classify") = Field({}, validate_default=True)  # type: ignore[valid-type]
    """What is learned: classify, multilabel, segment or detect."""
    pool: Literal["mean", "token", "attention"] = "mean"
    """Feature of an image. mean: the mean of its patch tokens. token: the class token, which pretraining trains only
    with the heads transformer and cross_attention. attention: what a new attention layer with one query reads from all
    tokens (timm's layer, for ViTs; Zhai et al. 2022, section 3.2)."""
    fc_norm: Bool | None = None
    """With pool: mean. true: a new norm of the mean replaces the encoder's final norm, as in MAE. false: the encoder's
    final norm is applied to each token before the mean. Default: as the encoder has it."""
    drop_path_rate: BelowOne = 0.0
    """Probability of skipping a residual branch in training (stochastic depth)."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup's beta distribution (Zhang et al. 2018). 0: no mixup."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of CutMix's beta distribution (Yun et al. 2019). 0: no CutMix."""
    head_init: Literal["zero", "probe"] = "zero"
    """How the new head starts. zero: close to zero, so that all classes are equally likely. probe: as a linear probe
    fitted to the frozen features of the training images (LP-FT, Kumar et al. 2022), whose score is also measured. From
    scratch it is always zero."""
    frozen: Fraction = 0.0
    """Fraction of the steps during which only the head learns. 1: the encoder stays frozen. Below 1: LP-FT (Kumar et
    al. 2022)."""
    unfreeze: Literal["at_once", "gradual"] = "at_once"
    """What happens after frozen. at_once: everything learns. gradual: block by block, the last one first (ULMFiT,
    Howard & Ruder 2018, section 3.3)."""
    ema_decay: BelowOne | None = None
    """Decay of a moving average of the weights, for example 0.9999, which is then judged and exported. It moves faster
    in the first steps. Default: no average."""
    balance: Literal["none", "sampling", "loss"] = "none"
    """How to treat classes of unequal size. sampling: images of small classes are drawn more often. loss: they weigh
    more."""
    early_stop: EarlyStop | None = None
    """Stop when the score on some held-out training images no longer rises: early_stop={}. Default: train to the
    end."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the encoder's linear layers: lora={}."""
    distill: Distill | None = None
    """Also learn from a teacher. The baseline cnn does not."""
    unlabeled: Unlabeled | None = None
    """Also learn from unlabeled images: unlabeled={images: shards/photos}. The baseline cnn does not."""
    optim: FinetuneOptim
    scratch: Scratch = Scratch()
    cnn: Cnn = Cnn()

    @model_validator(mode="before")
    @classmethod
    def _beside(cls, values: object) -> object:
        """Convert the old key `beside_scratch: true` or `false` into `beside`."""
        if not isinstance(values, dict) or "beside_scratch" not in values:
            return values
        if "beside" in values:
            raise ValueError("beside_scratch: is called beside now, which is also given; leave this one out")
        rest = {key: value for key, value in values.items() if key != "beside_scratch"}
        return {**rest, "beside": ["scratch"] if values["beside_scratch"] else []}

    @model_validator(mode="after")
    def _architecture(self) -> FinetuneRecipe:
        named = self.architecture and self.architecture.name
        if self.encoder == "scratch" and not named:
            raise ValueError("encoder: scratch requires architecture.name, a timm name")
        if self.encoder == "scratch" and "published" in self.beside:
            raise ValueError("beside: published: not with encoder: scratch; encoder=NAME takes timm's weights itself")
        if self.fc_norm and self.pool != "mean":
            raise ValueError(f"fc_norm: norms the mean of the patch tokens; not with pool: {self.pool}")
        if self.pool == "attention" and (self.frozen or self.lora or self.head_init == "probe"):
            raise ValueError(
                "pool: attention: learns from the first step on; not with frozen, lora or head_init: probe"
            )
        if self.unfreeze == "gradual" and not 0 < self.frozen < 1:
            raise ValueError("unfreeze: gradual: requires frozen between 0 and 1, the fraction of steps it takes")
        if self.lora and self.frozen == 1:
            raise ValueError("lora: cannot be combined with frozen: 1, which keeps the encoder unchanged")
        if self.lora and self.encoder == "scratch":
            raise ValueError("lora: cannot be combined with encoder: scratch")
        if self.unlabeled and self.distill:
            raise ValueError("unlabeled: cannot be combined with distill")
        if self.unlabeled and self.unlabeled.kind == "mixmatch":
            if self.task.name != "classify":
                raise ValueError("unlabeled: kind: mixmatch: only with task: classify; use fixmatch")
            if self.balance == "loss" or self.task.label_smoothing:
                raise ValueError("unlabeled: kind: mixmatch: not with balance: loss or task.label_smoothing")
        if self.unlabeled and self.unlabeled.start + self.unlabeled.warmup > 1:
            raise ValueError("unlabeled: start: at most 1 - warmup, or the weight never rises to its full value")
        if self.unlabeled and not self.ema_decay:
            raise ValueError("unlabeled: learns from a moving average of the weights; give ema_decay, such as 0.999")
        side_px = self.data.val_side_px
        if side_px is not None and side_px < min(self.data.image_size):
            raise ValueError(f"data: val_side_px: at least the shorter of image_size, {min(self.data.image_size)}")
        return self

    @model_validator(mode="after")
    def _kind_of_label(self) -> Self:
        """Check that the recipe has only values that the task's kind of label allows."""
        kind = registry.declaration("task", self.task.name).constants["labels"]
        constants = registry.declaration("labels", kind).constants
        for key, allowed in constants.get("allowed_values", {}).items():
            if reduce(getattr, key.split("."), self) not in allowed:
                instead = "; use data.fraction" if key == "data.labels_per_class" else ""
                section, _, rest = key.rpartition(".")
                where = f"{section}: {rest}" if section else rest
                raise ValueError(f"{where}: not with task: {self.task.name}{instead}")
        return self
