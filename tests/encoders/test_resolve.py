"""Keys that a recipe leaves to its encoder are filled in, and the result is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpp.encoders.resolve import resolve
from mpp.errors import UserError
from mpp.recipe.evaluate import EvaluateRecipe
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from mpp.recipe.pretrain import PretrainRecipe
from tests.conftest import pretrain_values


@pytest.fixture
def deep(tmp_path: Path) -> str:
    """An encoder that was trained on 12-bit images."""
    folder = tmp_path / "deep" / "encoder"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    normalisation = {"input_size": [1, 16, 16], "mean": [0.3], "std": [0.2]}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": normalisation}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": {"value_range": [0, 4095], "nodata": -1}}))
    return str(tmp_path / "deep")


def finetuning(encoder: str, **changes: Any) -> FinetuneRecipe:
    data = {"image_size": 16, "train": "a", "val": "b"} | changes.pop("data", {})
    values = {"job": "finetune", "out": "x", "encoder": encoder, "optim": {"steps": 1}, "data": data}
    return check_recipe(values | changes, FinetuneRecipe)


def test_all_of_it_is_filled_in(deep: str) -> None:
    data = resolve(finetuning(deep), deep, warn=True).data
    assert (data.channels, data.value_range, data.nodata) == (1, (0, 4095), -1)
    assert (data.mean, data.std) == ((0.3,), (0.2,))
    assert data.decoding()["value_range"] == (0, 4095)


def test_what_a_recipe_gives_stays(deep: str) -> None:
    with pytest.warns(match=r"data.mean: the encoder was trained with \[0.3\]; left out, that is taken"):
        found = resolve(
            finetuning(deep, data={"channels": 1, "value_range": [0, 255], "mean": [0.5]}), deep, warn=True
        ).data
    assert (found.value_range, found.mean, found.std) == ((0, 255), (0.5,), (0.2,))


TRAINED_WITH = r"; .*/deep was trained with data.channels=1, data.value_range=\[0,4095\], data.nodata=-1, data.mean=\[0.3\], data.std=\[0.2\]"


@pytest.mark.parametrize("key", ["auto_augment", "color_jitter"])
def test_an_augmentation_that_the_filled_in_range_does_not_allow(key: str, deep: str) -> None:
    value = 0.4 if key == "color_jitter" else "v0"
    message = rf"data.{key}: only for images of 8 bit.*; data.{key}=null leaves it out{TRAINED_WITH}$"
    with pytest.raises(UserError, match=message):
        resolve(finetuning(deep, data={key: value}), deep, warn=True)


@pytest.mark.parametrize("target", ["mean_color", "downsized_color"])
def test_a_colour_target_that_the_filled_in_range_does_not_allow(target: str, deep: str, tmp_path: Path) -> None:
    values = pretrain_values("a", tmp_path / "run", encoder={"name": deep}, target={"name": target})
    recipe = check_recipe(values, PretrainRecipe)
    with pytest.raises(UserError, match=rf"target: {target} takes classes from pixels of 8 bit.*{TRAINED_WITH}$"):
        resolve(recipe, deep, warn=True)


def test_an_evaluation_keeps_its_own_normalisation(deep: str) -> None:
    values = {"job": "evaluate", "encoder": deep, "data": {"train": "a", "val": "b"}}
    data = resolve(check_recipe(values, EvaluateRecipe), deep, warn=True, normalise=False).data
    assert (data.value_range, data.mean) == ((0, 4095), None)


def test_a_recipe_without_an_encoder_is_checked_too(tmp_path: Path) -> None:
    recipe = check_recipe(pretrain_values("a", tmp_path / "run", **{"data.nodata": 0}), PretrainRecipe)
    with pytest.raises(UserError, match=r"^data\.nodata: only with data\.value_range"):
        resolve(recipe, None, warn=True)
