"""Exports are verified: any damage is found."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

import mpp
from mpp.encoders.checksums import sha256
from mpp.encoders.resolve import resolve
from mpp.errors import UserError
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from mpp.recipe.sections import DECODING
from tests.conftest import pretrain_recipe


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    mpp.pretrain(pretrain_recipe(shards, out, **{"data.mean": [0.1, 0.2, 0.3], "optim.steps": 4}))
    return out


@pytest.fixture(scope="module")
def export_of_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "e"
    mpp.export(run, out)
    return out


@pytest.fixture
def exported(export_of_run: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may damage."""
    return Path(shutil.copytree(export_of_run, tmp_path / "e"))


@pytest.mark.parametrize(
    ("stored", "given", "found"),
    [
        ({}, {}, {"channels": 1, "value_range": None, "nodata": None}),
        ({"value_range": [0, 4095], "nodata": -1}, {}, {"channels": 1, "value_range": (0, 4095), "nodata": -1}),
        ({"value_range": [0, 4095]}, {"value_range": [0, 9]}, {"value_range": (0, 9)}),
        (
            {"value_range": [0, 4095], "nodata": -1},
            {"channels": 3},
            {"channels": 3, "value_range": None, "nodata": None},
        ),
        ({"formats": ["GIF"], "max_image_pixels": 10}, {}, {"formats": (*DECODING["formats"], "GIF")}),
        ({"formats": ["GIF"]}, {"formats": ["PNG"]}, {"formats": ("PNG",)}),
        ({"max_image_pixels": 10}, {}, {"max_image_pixels": DECODING["max_image_pixels"]}),
        ({"max_image_pixels": 10}, {"max_image_pixels": 20}, {"max_image_pixels": 20}),
    ],
)
@pytest.mark.filterwarnings("ignore:data.channels. 3, but the encoder:mpp.errors.MppWarning")
def test_images_are_read_as_the_encoder_s(
    stored: dict[str, Any], given: dict[str, Any], found: dict[str, Any], tmp_path: Path
) -> None:
    """Keys that the recipe does not set come from the encoder, but not its value range if the channels differ."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [1, 16, 16]}}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": stored}))
    recipe = finetune_recipe(str(tmp_path), **given)
    data = resolve(recipe, recipe.encoder, warn=True).data
    assert {key: getattr(data, key) for key in found} == found


def finetune_recipe(encoder: str, **data: Any) -> FinetuneRecipe:
    places = {"image_size": 16, "train": "a", "val": "b"}
    values = {"job": "finetune", "out": "x", "encoder": encoder, "optim": {"steps": 1}, "data": {**places, **data}}
    return check_recipe(values, FinetuneRecipe)


def test_nodata_without_a_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.nodata: only with data\.value_range"):
        resolve(finetune_recipe("vit_tiny_patch16_224", nodata=0), "vit_tiny_patch16_224", warn=True)
    with pytest.raises(UserError, match=r"data\.nodata: only with data\.value_range"):
        mpp.pretrain(pretrain_recipe("none", tmp_path / "run", **{"data.nodata": 0}))


def test_plain_timm_loads_it(run: Path, exported: Path) -> None:
    assert {p.name for p in exported.iterdir()} == {
        "config.json", "model.safetensors", "reference.safetensors", "export.json", "recipe.yaml", "README.md",
    }  # fmt: skip
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 16, 16)
    assert (model.pretrained_cfg["tag"], model.pretrained_cfg["license"]) == ("mpp", "unknown")
    assert model.num_classes == 0
    tuned = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=7, in_chans=1, img_size=32)
    assert tuned(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    # the weights are those of the last checkpoint
    state = load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(state[f"encoder.model.{name}"], value)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_leaves_nothing(run: Path, tmp_path: Path, number: signal.Signals) -> None:
    export = [sys.executable, "-m", "mpp", "export", str(run), str(tmp_path / "new" / "e")]
    process = subprocess.Popen(
        export,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore SIGINT in background jobs
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new/.export-*/encoder/README.md")):  # the export is being verified, or soon will be
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert not list((tmp_path / "new").iterdir())


def test_config_has_no_second_num_classes(exported: Path) -> None:
    assert "num_classes" not in json.loads((exported / "config.json").read_text())["model_args"]


@pytest.mark.usefixtures("new_interpreters")
def test_verify_says_what_holds(exported: Path) -> None:
    found = mpp.verify(exported)
    assert found.difference <= 1e-5
    assert found.parameters == sum(p.numel() for p in mpp.load_encoder(exported).parameters())


def change_weights(exported: Path, **changed: torch.Tensor | None) -> None:
    tensors = load_file(exported / "model.safetensors")
    for name, value in changed.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, exported / "model.safetensors")


@pytest.mark.parametrize("checksum", [True, False])
def test_changed_weights_are_found(exported: Path, checksum: bool) -> None:
    change_weights(exported, blocks__0__mlp__fc1__bias=torch.ones(128))
    if checksum:  # the checksum may be changed together with the weights, but then the features differ
        record = json.loads((exported / "export.json").read_text())
        record["weights_sha256"] = sha256(exported / "model.safetensors")
        (exported / "export.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="features differ by" if checksum else "checksum"):
        mpp.verify(exported)


@pytest.mark.parametrize("change", [{"norm__weight": None}, {"extra": torch.ones(2)}])
def test_missing_and_extra_weights_are_found(exported: Path, change: dict[str, torch.Tensor | None]) -> None:
    change_weights(exported, **change)
    record = json.loads((exported / "export.json").read_text())
    record["weights_sha256"] = sha256(exported / "model.safetensors")
    (exported / "export.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"cannot load it|missing weights|extra weights|changed weights"):
        mpp.verify(exported)


def test_a_config_of_another_model_is_found(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    config["model_args"]["num_heads"] = 4  # the same shapes, another function
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="features differ by"):
        mpp.verify(exported)


def test_what_no_feature_shows_is_found(exported: Path) -> None:
    """Names of classes, mean and std do not change the features, so the checksum must cover them."""
    config = json.loads((exported / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.9, 0.9, 0.9]
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: does not match the checksum of its export"):
        mpp.verify(exported)


def test_features_that_are_no_numbers(exported: Path) -> None:
    reference = load_file(exported / "reference.safetensors")
    save_file(reference | {"embedding": reference["embedding"] * torch.nan}, exported / "reference.safetensors")
    with pytest.raises(UserError, match="features differ by nan"):
        mpp.verify(exported)


def test_not_into_itself(exported: Path) -> None:
    for format in ("timm", "safetensors"):
        with pytest.raises(UserError, match="is inside .*; choose another folder"):
            mpp.export(exported, exported / "inner" / "e", format)


def test_what_cannot_be_exported(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not empty; give a new folder"):
        mpp.export(run, exported)
    with pytest.raises(UserError, match="neither a run nor an exported encoder"):
        mpp.export(tmp_path / "none", tmp_path / "o")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").touch()
    with pytest.raises(UserError, match="has not written its encoder yet; finish it with --resume auto"):
        mpp.export(tmp_path / "begun", tmp_path / "o")
    (tmp_path / "begun" / "status.json").write_text('{"state": "running"}')
    with pytest.raises(UserError, match="this run is still in progress, or was killed, .*; `mpp watch` shows which"):
        mpp.export(tmp_path / "begun", tmp_path / "o")
    (exported / "reference.safetensors").rename(tmp_path / "reference")
    with pytest.raises(UserError, match=r"reference\.safetensors is missing"):
        mpp.verify(exported)
    (tmp_path / "reference").rename(exported / "reference.safetensors")
    (exported / "export.json").write_text("{}")
    with pytest.raises(UserError, match=r"no readable export\.json"):
        mpp.verify(exported)
    with pytest.raises(UserError, match=r"no readable export\.json"):
        mpp.export(exported, tmp_path / "copy")
    assert not (tmp_path / "copy").exists(), "an export that fails its verification must be deleted"
    (exported / "export.json").unlink()
    with pytest.raises(UserError, match=r"no readable export\.json"):
        mpp.verify(exported)


def test_what_does_not_hold_is_not_handed_out(exported: Path, tmp_path: Path) -> None:
    reference = load_file(exported / "reference.safetensors")
    save_file(reference | {"embedding": reference["embedding"] + 1}, exported / "reference.safetensors")
    with pytest.raises(UserError, match=r"/f: features differ by .*, more than 1e-04"):
        mpp.export(exported, tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.slow
def test_only_new_or_empty_folders_are_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keep.tmp").mkdir()
    (tmp_path / "keep.tmp" / "mine").touch()
    mpp.export(run, tmp_path / "keep")
    assert (tmp_path / "keep.tmp" / "mine").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mpp.export(run, ".")
    assert (tmp_path / "here" / "model.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"keep", "keep.tmp", "here"}, "no temporary files may be left behind"


def test_others_may_read_it(exported: Path, run: Path) -> None:
    for folder in (exported, *(run / "checkpoints").iterdir()):
        assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "all files must have the same permissions"


def test_what_load_encoder_is_not_given(exported: Path) -> None:
    with pytest.raises(UserError, match="TypeError: .*no_such"):
        mpp.load_encoder(exported, no_such=3)


def test_the_card_says_how_it_was_made(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for words in ("vit_tiny_patch16_224", "mask uniform", "norm_pixels", "timm.create_model", "fine-tune"):
        assert words in card
