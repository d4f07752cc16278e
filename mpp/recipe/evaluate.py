"""The recipe of `mpp evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from mpp.recipe.flat import JsonObject
from mpp.recipe.sections import Architecture, Job, LabeledData, Section
from mpp.recipe.values import (
    Bool,
    FilePath,
    Float,
    ImageSize,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probe,
    listed,
)


class EvaluateData(LabeledData):
    """Labeled images. By default, size and normalisation are those of the encoder."""

    image_size: ImageSize | None = None  # type: ignore[assignment]
    """Side of the images in pixels, or [height, width]. Default: the encoder's."""
    batch_size: PositiveInt = 256
    """Images in the memory of a device at once."""


class Knn(Section):
    """Nearest neighbours by cosine similarity, each with one vote."""

    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 5, 10, 20, 50, 100, 200)
    """Numbers of neighbours to try (DINO, Caron et al. 2021, section 4.1, uses 10 to 200)."""


class LinearProbe(Section):
    """Multinomial logistic regression on standardised features, by L-BFGS."""

    weight_decay: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0,
    )  # fmt: skip
    """Values to try: λ of mean cross-entropy + λ/2 · |weights|² (CLIP, Radford et al. 2021, A.3, sweeps 1e-6 to
    1e6)."""
    max_iterations: PositiveInt = 200
    """Most iterations of L-BFGS."""


class AttentiveProbe(Section):
    """One learned query that attends to the patch tokens, then a linear layer (CAE, Chen et al. 2022, section 4.1)."""

    batch_size: PositiveInt = 64
    """Images of one optimizer step."""

    lr: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (3e-4, 1e-3, 3e-3)
    """Learning rates to try (a guess)."""
    epochs: PositiveInt = 20
    """Passes over the training images (a guess)."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of the probe."""


def _out_may_be_left_out(schema: JsonObject) -> None:
    schema["required"].remove("out")
    schema["properties"]["out"]["type"] = ["string", "null"]


class EvaluateRecipe(Job):
    """Evaluation of a frozen encoder's features, layer by layer, compared with controls."""

    model_config = ConfigDict(json_schema_extra=_out_may_be_left_out)

    job: Literal["evaluate"] = "evaluate"
    """The command that runs this recipe."""
    encoder: FilePath
    """Encoder to evaluate: the folder of a pretraining run or an export, or a timm name."""
    architecture: Architecture | None = None
    """Changed timm arguments of the encoder."""
    compare: FilePath | None = None
    """Another encoder to evaluate in the same way."""
    controls: Bool = True
    """Also evaluate the same architecture with random weights, and raw pixels."""
    seed: Annotated[NonNegativeInt, Field(lt=2**56)] = 0
    """Seed of the labels drawn, the split of the training images, the random weights and the attentive probe."""
    data: EvaluateData
    probes: Annotated[
        tuple[Probe, ...],
        BeforeValidator(listed, json_schema_input_type=Probe | Annotated[tuple[Probe, ...], Field(min_length=1)]),
        Field(min_length=1),
    ] = ("knn", "linear", "attentive")
    """Probes to fit: knn, linear, attentive."""
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Blocks, or stages of hierarchical encoders, to probe, counted from 1. Default: all. The output of the whole
    encoder, called out, is always probed."""
    tune_fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the training images on which k, weight decay, learning rate and the best layer are chosen."""
    knn: Knn = Knn()
    linear: LinearProbe = LinearProbe()
    attentive: AttentiveProbe = AttentiveProbe()
    keep_features: Bool = False
    """Write the features into the run folder as .npy files."""

    @model_validator(mode="before")
    @classmethod
    def _own_out(cls, values: Any) -> Any:
        """Fill in the run folder if none is given: inside the run that made the encoder, else evaluation/NAME."""
        encoder = values.get("encoder") if isinstance(values, Mapping) else None
        if not isinstance(encoder, str) or values.get("out") is not None:
            return values
        run = Path(encoder).expanduser()
        out = run / "evaluation" if (run / "encoder").is_dir() else Path("evaluation") / run.name
        return {**values, "out": str(out)}
