"""The approaches that a run compares: the pretrained encoder and its baselines. Each has its own recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import timm

from mpp.encoders.resolve import own_normalisation
from mpp.encoders.sources import is_timm_name
from mpp.errors import UserError
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.flat import JsonObject
from mpp.recipe.loading import check_recipe
from mpp.runs.history import approaches_of_finetune
from mpp.runs.records import encoder_folder

SMALL_BELOW_PX = 128
"""If the shorter image side is below this, the default CNN is the narrow one."""
ENLARGED_BELOW_PX = 48
"""If the shorter image side is below this, the CNN reads images of twice the size, as its first layers halve them
twice."""
STRIDE_PX = 32
"""Stride of the default CNNs. Their image sides must be multiples of it."""
NARROW: JsonObject = {"channels": [32, 64, 128, 256], "stem_width": 16}
"""Arguments of a ResNet-18-D (He et al. 2019, section 4) of half the width. Among the networks tried on CIFAR-10 with
100 labels per class, it was the most accurate for its time, see recipes/LOG.md."""


GIVEN_ELSEWHERE = ("img_size", "in_chans", "num_classes", "global_pool", "drop_path_rate", "fc_norm")
"""Arguments of timm that follow from other keys of a recipe."""
KEYS_OF_CNN = {"data.image_size": "cnn.image_size", "architecture.name": "cnn.name", "architecture.args": "cnn.args"}
"""Key in the CNN's own recipe -> key in the user's recipe."""


def approaches_of(recipe: FinetuneRecipe) -> list[str]:
    """Return the names of a run's approaches. The first is the encoder itself, whose time the CNN gets."""
    return approaches_of_finetune({"encoder": recipe.encoder, "beside": recipe.beside})


def recipe_of_approach(recipe: FinetuneRecipe, approach: str) -> FinetuneRecipe:
    """Return the recipe of one approach: the recipe of the run with the keys that this approach changes.

    Args:
        recipe: Recipe of the run, resolved.
        approach: One of `approaches_of`.

    Raises:
        UserError: If keys of the recipe conflict for this approach, or if there are no published weights.
    """
    if approach == "pretrained":
        return recipe
    values = recipe.model_dump(mode="json", exclude_unset=True)
    {"scratch": _from_scratch, "cnn": _as_cnn, "published": _from_published}[approach](recipe, values)
    values["beside"] = []
    with named_after(approach, recipe):
        return check_recipe(values, FinetuneRecipe)


@contextmanager
def named_after(approach: str, recipe: FinetuneRecipe) -> Iterator[None]:
    """Add the approach to error messages raised inside, and replace keys by those in the user's recipe."""
    try:
        yield
    except UserError as error:
        if approach not in recipe.beside or (approach == "scratch" and not recipe.scratch.model_fields_set):
            raise  # the keys are those that the user wrote
        lines = [line.removeprefix("recipe: ") for line in str(error).splitlines()]
        for theirs, ours in KEYS_OF_CNN.items() if approach == "cnn" else ():
            lines = [line.replace(theirs, ours) for line in lines]
        raise UserError("\n".join(f"beside: {approach}: {line}" for line in lines)) from error


def _from_scratch(recipe: FinetuneRecipe, values: JsonObject) -> None:
    """Change `values` for random weights, according to the keys of `scratch`.

    By default there is no layer decay and nothing is frozen, because there are no pretrained weights to protect.
    """
    ours = recipe.scratch
    for key, value in (("base_lr", ours.base_lr), ("layer_decay", ours.layer_decay)):
        if value is not None:
            values["optim"][key] = value
    if ours.frozen is not None:
        values["frozen"] = ours.frozen
        if not 0 < ours.frozen < 1:
            values["unfreeze"] = "at_once"
    values |= {"lora": None, "head_init": "zero"}


def _as_cnn(recipe: FinetuneRecipe, values: JsonObject) -> None:
    """Change `values` for another encoder from scratch, with its own image size and learning rate.

    Its length follows from the time that the encoder took, see `equal_time.py`.
    """
    cnn, (height, width) = recipe.cnn, recipe.data.image_size
    values["encoder"] = "scratch"
    small = min(height, width) < SMALL_BELOW_PX
    args = cnn.args or (NARROW if small and cnn.name is None else {})
    values["architecture"] = {"name": cnn.name or ("resnet18d" if small else "resnet18"), "args": args}
    factor = 2 if min(height, width) < ENLARGED_BELOW_PX else 1
    rounded = [math.ceil(factor * side / STRIDE_PX) * STRIDE_PX for side in (height, width)]
    values["data"]["image_size"] = list(cnn.image_size or rounded)
    values["optim"] |= {
        "name": cnn.optimizer,
        "base_lr": cnn.base_lr,
        "weight_decay": cnn.weight_decay,
        "layer_decay": 1.0,
        "head_lr_scale": 1.0,
    }
    values |= {
        "unlabeled": None,
        "head_init": "zero",
        "distill": None,
        "frozen": 0.0,
        "unfreeze": "at_once",
        "lora": None,
        "pool": "mean",
        "fc_norm": None,
        "drop_path_rate": 0.0,
    }


def _from_published(recipe: FinetuneRecipe, values: JsonObject) -> None:
    """Change `values` to the published timm weights of the same architecture, with their normalisation of images.

    Raises:
        UserError: If timm has no weights for the architecture, or if the encoder already is a timm model.
    """
    if is_timm_name(recipe.encoder):
        raise UserError(f"beside: published: the encoder is timm's {recipe.encoder} itself; use scratch or cnn")
    config = json.loads((encoder_folder(recipe.encoder) / "config.json").read_text())
    name = str(config["architecture"])
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None or not known.has_weights:
        raise UserError(f"beside: published: timm {timm.__version__} has no published weights for {name}")
    given = recipe.architecture.args if recipe.architecture else {}
    values["encoder"] = name
    values["architecture"] = {"args": {**_of_constructor(config), **given}}
    channels = recipe.data.channels
    mean_std = own_normalisation(name, channels)
    if mean_std is not None:
        values["data"]["mean"], values["data"]["std"] = mean_std


def _of_constructor(config: JsonObject) -> JsonObject:
    """Return the arguments that an encoder was built with, without those that other keys of a recipe set."""
    args = config.get("model_args") or {}
    return {key: value for key, value in args.items() if key not in GIVEN_ELSEWHERE}
