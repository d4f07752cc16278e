"""What a fine-tuned encoder is compared with: approaches, equal time, published weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

import mpp
from mpp.errors import UserError
from mpp.finetuning.approaches import approaches_of, recipe_of_approach
from mpp.finetuning.minutes_before import minutes_before
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from mpp.runs.history import approaches_of_finetune
from tests.conftest import pretrain_recipe
from tests.finetuning.test_finetuning import ARGS, values

CNN = {
    "name": "resnet18",
    "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8},
    "image_size": 32,
}
NAME = "mpp_test_published_vit"


def recipe(shards: Path, out: Path, encoder: Path | str, **changes: Any) -> FinetuneRecipe:
    return check_recipe(values(shards, out, encoder, **copy.deepcopy(changes)), FinetuneRecipe)


@pytest.mark.parametrize("beside", [[], ["scratch"], ["cnn", "scratch"], "cnn"])
@pytest.mark.parametrize("encoder", ["runs/x", "scratch"])
def test_approaches_are_those_that_the_records_name(beside: Any, encoder: str, shards: Path, tmp_path: Path) -> None:
    architecture = {"name": "vit_tiny_patch16_224"} if encoder == "scratch" else None
    made = recipe(shards, tmp_path, encoder, beside=beside, architecture=architecture)
    assert approaches_of(made) == approaches_of_finetune({"encoder": encoder, "beside": beside})
    assert approaches_of(made)[0] == ("scratch" if encoder == "scratch" else "pretrained")


def test_recipes_from_before_beside_are_read(shards: Path, tmp_path: Path) -> None:
    assert recipe(shards, tmp_path, "runs/x", beside_scratch=False).beside == ()
    assert recipe(shards, tmp_path, "runs/x", beside_scratch=True).beside == ("scratch",)
    with pytest.raises(UserError, match="beside_scratch: is called beside now, which is also given"):
        recipe(shards, tmp_path, "runs/x", beside_scratch=True, beside="cnn")
    with pytest.raises(UserError, match="beside: published: not with encoder: scratch"):
        recipe(shards, tmp_path, "scratch", architecture={"name": "vit_tiny_patch16_224"}, beside="published")
    assert approaches_of_finetune({"encoder": "runs/x", "beside_scratch": False}) == ["pretrained"]
    assert approaches_of_finetune({"encoder": "runs/x"}) == ["pretrained", "scratch"]


def test_each_approach_is_a_recipe(shards: Path, tmp_path: Path) -> None:
    made = recipe(
        shards, tmp_path, "runs/x", frozen=0.5, unfreeze="gradual", lora={}, beside=["scratch", "cnn"],
        **{"scratch.base_lr": 0.125, "cnn.base_lr": 0.25, "drop_path_rate": 0.1},
    )  # fmt: skip
    assert recipe_of_approach(made, "pretrained") is made
    scratch = recipe_of_approach(made, "scratch")
    assert (scratch.optim.base_lr, scratch.optim.layer_decay, scratch.frozen, scratch.lora) == (0.125, 1.0, 0.0, None)
    assert (scratch.encoder, scratch.drop_path_rate) == ("runs/x", 0.1)
    cnn = recipe_of_approach(made, "cnn")
    assert cnn.architecture is not None
    assert (cnn.encoder, cnn.architecture.name, cnn.optim.base_lr, cnn.lora) == ("scratch", "resnet18d", 0.25, None)
    assert cnn.data.image_size == (32, 32), "images of 16 px must be enlarged"
    images = {"images": "photos"}
    learning = recipe(shards, tmp_path, "runs/x", ema_decay=0.9, unlabeled=images, beside=["scratch", "cnn"])
    taught = recipe(shards, tmp_path, "runs/x", distill={"teacher": "runs/y", **images}, beside=["scratch", "cnn"])
    assert recipe_of_approach(learning, "scratch").unlabeled == learning.unlabeled
    assert recipe_of_approach(taught, "scratch").distill == taught.distill
    assert recipe_of_approach(learning, "cnn").unlabeled is None, "the CNN is what one would train without such images"
    assert recipe_of_approach(taught, "cnn").distill is None
    large = recipe(shards, tmp_path, "runs/x", beside="cnn", **{"data.image_size": 224})
    cnn = recipe_of_approach(large, "cnn")
    assert (cnn.data.image_size, cnn.architecture and cnn.architecture.args) == ((224, 224), {})
    for side_px, of_cnn in ((28, 64), (48, 64), (64, 64), (112, 128)):
        made = recipe(shards, tmp_path, "runs/x", beside="cnn", **{"data.image_size": side_px})
        assert recipe_of_approach(made, "cnn").data.image_size == (of_cnn, of_cnn), (
            "the size must be a multiple of the CNN's stride"
        )


def test_messages_about_the_cnn_name_its_own_keys(shards: Path, run: Path, tmp_path: Path) -> None:
    for cnn, words in (
        ({"name": "resnet19"}, "beside: cnn: cnn.name: timm .* has no model 'resnet19'"),
        ({"args": {"bogus": 1}}, "beside: cnn: cnn.args: resnet18d does not take this"),
        (
            {"image_size": 40},
            "beside: cnn: cnn.image_size: the encoder has a stride of 32 px; expected multiples of it, got 40×40",
        ),
    ):
        with pytest.raises(UserError, match=words):
            mpp.finetune(recipe(shards, tmp_path / "run", run, beside=["cnn"], cnn=cnn, seeds=[0]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", [["mixup=0.4", "task.label_smoothing=0.1"], ["early_stop={}", "ema_decay=0.9"]])
def test_a_cnn_beside_gets_the_time_of_the_encoder(which: list[str], shards: Path, run: Path, tmp_path: Path) -> None:
    """The CNN's length is measured. A trial that was cut off resumes with the measured length, to the same weights."""
    from mpp.recipe.overrides import parse_overrides

    out = tmp_path / "run"
    made = recipe(shards, out, run, beside=["cnn"], cnn=CNN, seeds=[0], **{"optim.steps": 12}, **parse_overrides(which))
    result = mpp.finetune(made)
    trial = out / "cnn-seed0"
    length = json.loads((trial / "length.json").read_text())
    took = minutes_before(made, "pretrained", "CPU")
    assert minutes_before(made, "pretrained", "GPU") is None, "minutes of another kind of device must not be added"
    assert minutes_before(made, "cnn", "CPU") == 0
    assert took == length["minutes_before"]
    assert took is not None
    assert took > 0
    spent = json.loads(max((out / "pretrained-seed0" / "checkpoints").glob("*/state.json")).read_text())[
        "device_minutes"
    ]
    assert length["finetuning_minutes"] == spent > 0
    in_time = max(1, round((took + spent) / length["step_minutes"]))
    assert length["steps"] == min(in_time, 1000 * 10 // 2)
    config = json.loads((trial / "encoder" / "config.json").read_text())
    assert (config["architecture"], config["pretrained_cfg"]["input_size"]) == ("resnet18", [3, 32, 32])
    card = mpp.export(trial, tmp_path / "export").folder / "README.md"
    assert "| architecture | resnet18 (args" in card.read_text(), "the card must be of this approach, not of the run"
    assert result.verdicts[0].cost is not None
    assert result.verdicts[0].cost.minutes.keys() == {"pretrained", "cnn"}
    assert "the CNN from scratch" in result.table()
    assert f"{length['steps']} steps: the encoder took" in (trial / "train.log").read_text()

    weights = load_file(trial / "encoder" / "model.safetensors")
    shutil.rmtree(trial / "encoder")
    (trial / "result.json").unlink()
    for checkpoint in (trial / "checkpoints").iterdir():
        if not checkpoint.name.endswith("7"):
            shutil.rmtree(checkpoint)
    mpp.finetune(made, resume="auto")
    assert json.loads((trial / "length.json").read_text()) == length
    again = load_file(trial / "encoder" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_passes_end_it_where_there_is_more_time(shards: Path, run: Path, tmp_path: Path) -> None:
    changes = {"optim.steps": 12, "cnn.max_epochs": 0.1, "data.labels_per_class": 4}
    out = tmp_path / "run"
    cnn = {**CNN, "optimizer": "muon", "base_lr": 1e-3}
    mpp.finetune(recipe(shards, out, run, beside=["cnn"], cnn=cnn, seeds=[0], **changes))
    assert json.loads((out / "cnn-seed0" / "length.json").read_text())["ended_by"] == "max_epochs"
    assert "cnn.max_epochs ends it" in (out / "cnn-seed0" / "train.log").read_text()


def test_approaches_may_be_added_to_a_finished_run(shards: Path, run: Path, tmp_path: Path) -> None:
    small = {"seeds": [0], "optim.steps": 3}
    mpp.finetune(recipe(shards, tmp_path / "run", run, beside=[], **small))
    more = mpp.finetune(recipe(shards, tmp_path / "run", run, beside=["cnn"], cnn=CNN, **small), resume="auto")
    assert more.score.keys() == {"pretrained", "cnn"}
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["beside"] == ["cnn"], (
        "the run's record must name the new approach"
    )
    other = recipe(shards, tmp_path / "run", run, beside=["cnn"], cnn={**CNN, "base_lr": 1.0}, **small)
    with pytest.raises(UserError, match=r"cnn\.base_lr: was 0\.2, now 1\.0"):
        mpp.finetune(other, resume="auto")


@register_model
def mpp_test_published_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    from timm.models._builder import build_model_with_cfg

    args = {"img_size": 16, **ARGS}
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, NAME, pretrained, **{**args, **kwargs})
    return model


def test_published_weights_beside(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _registry
    from timm.models._pretrained import DefaultCfg, PretrainedCfg

    torch.manual_seed(3)
    theirs = timm.create_model(NAME, num_classes=5)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    config = PretrainedCfg(
        file=str(tmp_path / "theirs.safetensors"), num_classes=5, input_size=(3, 16, 16), first_conv="patch_embed.proj",
        classifier="head", mean=(0.25, 0.25, 0.25), std=(0.125, 0.125, 0.125), architecture=NAME,
    )  # fmt: skip
    run = tmp_path / "pretrained"
    mpp.pretrain(pretrain_recipe(shards, run, **{"encoder.name": NAME, "encoder.args": {}, "optim.steps": 2}))
    made = recipe(shards, tmp_path / "run", run, beside=["published"], seeds=[0], **{"optim.steps": 1})
    with pytest.raises(UserError, match=f"beside: published: timm .* has no published weights for {NAME}"):
        mpp.finetune(made)
    assert not (tmp_path / "run").exists()

    monkeypatch.setitem(_registry._model_pretrained_cfgs, NAME, config)
    monkeypatch.setitem(_registry._model_default_cfgs, NAME, DefaultCfg(is_pretrained=True))
    of_approach = recipe_of_approach(made, "published")
    assert (of_approach.encoder, of_approach.data.mean) == (NAME, (0.25, 0.25, 0.25))
    from mpp.finetuning.model import build

    encoder = build(of_approach, "published", 0, 5).encoder
    assert torch.equal(
        encoder.state_dict()["blocks.0.attn.qkv.weight"], theirs.state_dict()["blocks.0.attn.qkv.weight"]
    )
    result = mpp.finetune(made)
    assert result.score.keys() == {"pretrained", "published"}
    assert "with one seed, which may be chance" in result.table()


def test_published_weights_of_what_is_published_itself(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="beside: published: the encoder is timm's vit_tiny_patch16_224 itself"):
        recipe_of_approach(recipe(shards, tmp_path, "vit_tiny_patch16_224", beside="published"), "published")
