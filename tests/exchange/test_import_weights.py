"""Importing weights: all weights of an encoder arrive or none, and files are opened as tensors only."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mpp
from mpp.errors import MppWarning, UserError
from mpp.exchange.verify import Verified
from mpp.objective.build import build_model
from tests.conftest import Runs, command, pretrain_recipe

ARGS = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Weights of a classifier, whose head is not part of the encoder."""
    torch.manual_seed(0)
    return dict(timm.create_model(NAME, img_size=16, num_classes=3, **ARGS).state_dict())


def imported(file: Path, out: Path, **more: Any) -> Any:
    """Import a file, with a mean and std unless the test passes its own."""
    known = {} if {"mean", "std"} & more.keys() else {"mean": [0.5] * 3, "std": [0.5] * 3}
    return mpp.import_weights(file, out, **{"model": NAME, "args": ARGS, "image_size": (16, 16), **known, **more})


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the verification in a clean process, which other tests cover."""
    monkeypatch.setattr("mpp.exchange.verify.verify_timm_folder", lambda folder: Verified(Path(folder), 0.0, 0))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "under state_dict, of a wrapped module": lambda s: {"state_dict": OrderedDict(prefixed(s, "module."))},
    "plain": lambda s: s,
    "under model": lambda s: {"model": s, "epoch": 3},
    "of a teacher beside a head": lambda s: {"teacher": prefixed(s, "backbone.") | {"head.last.weight": torch.ones(3)}},
    "beside a step": lambda s: {"model": s, "step": torch.tensor(3)},
    "in a state_dict of a model": lambda s: {"model": {"state_dict": s}},
    "beside arguments": lambda s: {"model": s, "args": argparse.Namespace(lr=1)},
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
    "beside another network": lambda s: prefixed(s, "encoder.") | {"decoder.blocks.0.norm1.weight": torch.ones(4)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("unverified")
def test_all_weights_come_over(layout: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth")
    found = imported(tmp_path / "w.pth", tmp_path / "e", trust=True)
    assert any(name.endswith("head.weight") for name in found.left_out)
    model = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True)
    assert model.num_classes == 0
    for name, value in model.state_dict().items():
        expected = state[name].half().float() if "half" in layout else state[name]
        assert torch.equal(value, expected), name
    card = (tmp_path / "e" / "README.md").read_text()
    assert "Weights of `w.pth`, named as timm does, in timm's `vit_tiny_patch16_224`." in card
    assert "recipe.yaml" not in card


def test_safetensors_need_no_trust_whatever_the_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.pth")
    assert imported(tmp_path / "w.pth", tmp_path / "e").left_out == ["head.bias", "head.weight"]


@pytest.mark.slow
def test_an_import_is_an_encoder_like_any_other(state: dict[str, Tensor], shards: Path, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    words = ["--model", NAME, "--image-size", "16", *(f"{k}={v}" for k, v in ARGS.items())]
    refused = command("import", tmp_path / "w.safetensors", tmp_path / "e", *words)
    assert refused.returncode == 2
    assert refused.stderr.startswith("mean, std: unknown for these weights. Give both")
    words += ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]
    done = command("import", tmp_path / "w.safetensors", tmp_path / "e", *words)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.endswith("load through plain timm; features differ by 0.0e+00")
    half = "[0.5, 0.5, 0.5]"
    assert second == (
        "18 of 18 weights, named as timm does; 2 tensors left out (head.bias, head.weight); "
        f"mean {half} and std {half} are as given"
    )
    mpp.export(tmp_path / "e", tmp_path / "again")
    data = {"data.train": str(shards), "data.val": str(shards / "shard-000000.tar"), "data.image_size": 16}
    options: dict[str, Any] = {"optim.steps": 1, "optim.epochs": None, "seeds": [0], "data.workers": 0}
    with pytest.warns(mpp.MppWarning, match="also in data.train"):
        tuned = mpp.finetune(
            {"job": "finetune", "out": str(tmp_path / "ft"), "encoder": str(tmp_path / "again")},
            **data,
            **options,
        )
    assert tuned.state == "finished"


@pytest.mark.parametrize("by_torch", [True, False])
def test_pickles(by_torch: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    """A pickle is opened only with trust, and even then none of its code runs."""
    file, poison = tmp_path / "w.safetensors", {"model": state, "hook": Runs(tmp_path / "mark")}
    torch.save(poison, file) if by_torch else file.write_bytes(pickle.dumps(poison))
    with pytest.raises(UserError, match=r"w\.safetensors: a pickle, which may run any code .* --trust opens it"):
        imported(file, tmp_path / "e")
    with pytest.raises(
        UserError, match=r"holds more than tensors and plain containers: \w+\.mkdir" if by_torch else "not of torch"
    ) as error:
        imported(file, tmp_path / "e", trust=True)
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors"}


@pytest.mark.usefixtures("unverified")
def test_one_of_two_encoders(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {name: value + 0.01 for name, value in state.items()}
    torch.save({"student": state, "teacher": prefixed(other, "module.")}, tmp_path / "w")
    found = imported(tmp_path / "w", tmp_path / "e", trust=True, prefix="teacher.module.")
    assert str(found).startswith("18 of 18 weights, named as timm does, from teacher.module.*; ")
    model = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True)
    assert torch.equal(model.state_dict()["norm.bias"], state["norm.bias"] + 0.01)


def test_a_byte_that_changed(state: dict[str, Tensor], tmp_path: Path) -> None:
    """torch does not check the checksums of its files, so the import must."""
    torch.save(state, tmp_path / "w")
    data = bytearray((tmp_path / "w").read_bytes())
    data[data.index(state["blocks.0.mlp.fc1.weight"].numpy().tobytes()) + 3] ^= 0x80
    (tmp_path / "w").write_bytes(data)
    assert torch.load(tmp_path / "w", weights_only=True).keys() == state.keys()
    with pytest.raises(UserError, match="w: damaged, or not of torch.save: BadZipFile"):
        imported(tmp_path / "w", tmp_path / "e", trust=True)


@pytest.mark.usefixtures("unverified")
def test_pretraining_goes_on_from_an_import(state: dict[str, Tensor], shards: Path, tmp_path: Path) -> None:
    """Pretraining starts from the imported weights. It takes their normalisation if the recipe has none, and can be
    resumed.
    """
    save_file(state, tmp_path / "w")
    imported(tmp_path / "w", tmp_path / "e", mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5])

    def asked(out: str, **changes: Any) -> Any:
        start = {"encoder": {"name": str(tmp_path / "e")}, "optim.steps": 2}
        return pretrain_recipe(shards, tmp_path / out, **start | changes)

    recipe = asked("run")
    model, _ = build_model(recipe)
    own = model.encoder.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    mpp.pretrain(recipe)
    assert mpp.pretrain(asked("run"), resume="auto").state == "finished"
    cfg = json.loads((tmp_path / "run/encoder/config.json").read_text())["pretrained_cfg"]
    assert cfg["mean"] == [0.1, 0.2, 0.3]
    start = mpp.load_encoder(tmp_path / "e").state_dict()
    found = mpp.load_encoder(tmp_path / "run").state_dict()
    assert found.keys() == start.keys()
    assert not torch.equal(found["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
    for change, message in (
        (
            {"encoder.args": {"depth": 3}},
            "encoder.args.depth: .* is a folder, which has its own; only drop rates can be given",
        ),
        ({"data.image_size": 18}, "data.image_size"),
        ({"encoder.name": str(tmp_path / "none" / "e")}, "encoder.name: no such folder, and timm"),
        ({"encoder.name": str(tmp_path)}, "neither a run nor an exported encoder"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(asked("other", **change))


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=": not a file"):
            imported(place, tmp_path / "e", trust=True)


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViTMAE as transformers saves it, with its image processor."""
    hub = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = hub.ViTMAEConfig(**sizes, image_size=16, patch_size=4, layer_norm_eps=1e-6, decoder_num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("hub")
    hub.ViTMAEForPreTraining(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3]}')
    return folder


@pytest.mark.slow
def test_a_folder_of_transformers_says_itself_what_it_is(hub_folder: Path, tmp_path: Path) -> None:
    done = command("import", hub_folder, tmp_path / "e")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[1]
    assert said.startswith("18 of 18 weights, named as transformers does, from vit.*; 24 tensors left out (decoder.dec")
    assert said.endswith("; mean [0.4, 0.5, 0.6] and std [0.2, 0.2, 0.3] are those of the folder")
    model = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True)
    assert list(model.pretrained_cfg["mean"]) == [0.4, 0.5, 0.6]
    assert model.patch_embed.img_size == (16, 16)


@pytest.mark.usefixtures("unverified")
def test_a_folder_in_parts_and_a_timm_folder(hub_folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    weights = load_file(hub_folder / "model.safetensors")
    names = sorted(weights)
    listed = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(listed.values()):
        save_file({n: weights[n] for n in names if listed[n] == part}, parts / part)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    shutil.copy(hub_folder / "config.json", parts)
    first = mpp.import_weights(parts, tmp_path / "first")
    assert (first.layout, first.normalisation) == ("transformers", "those of MAE")
    assert first.mean == [0.485, 0.456, 0.406]
    second = mpp.import_weights(tmp_path / "first", tmp_path / "second")
    assert (second.layout, second.prefix, second.missing, second.left_out) == ("timm", "", [], [])
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@pytest.mark.usefixtures("unverified")
def test_what_a_folder_says_holds_whoever_names_the_model(hub_folder: Path, tmp_path: Path) -> None:
    """Number of heads and activation cannot be told from the weights, so the folder's config decides."""
    found = mpp.import_weights(hub_folder, tmp_path / "e", model="vit_base_patch16_224.mae")
    assert not found.missing
    assert mpp.load_encoder(tmp_path / "e").blocks[0].attn.num_heads == 2
    with pytest.raises(UserError, match=r"args.num_heads: 4 contradicts .*/config\.json \(2\)"):
        mpp.import_weights(hub_folder, tmp_path / "f", model="vit_tiny_patch16_224", args={"num_heads": 4})
    folder = shutil.copytree(hub_folder, tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"layer_norm_eps": 0.1}, "config.json: layer_norm_eps: 0.1; timm's is 1e-06"),
        ({"architecture": 5}, "architecture: 5: not a name of timm's"),
        ({"architecture": "local-dir:/etc"}, "architecture: 'local-dir:/etc': not a name of timm's"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            mpp.import_weights(folder, tmp_path / "f")


@pytest.mark.usefixtures("unverified")
def test_normalisation_of_an_image_processor(hub_folder: Path, tmp_path: Path) -> None:
    """Mean and std are converted to those of pixels in [0, 1]."""
    folder = shutil.copytree(hub_folder, tmp_path / "hub")
    for number, (said, mean, std) in enumerate(
        (
            ({"do_normalize": False}, 0.0, 1.0),
            ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}, 0.5, 0.2),
            ({"rescale_factor": 2 / 255, "image_mean": [1] * 3, "image_std": [1] * 3}, 0.5, 0.5),
        )
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
        found = mpp.import_weights(folder, tmp_path / f"e{number}")
        assert (found.mean, found.std) == (pytest.approx([mean] * 3), pytest.approx([std] * 3))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [5, 5, 5], "image_std": [0, 0, 0]}')
    with pytest.raises(UserError, match=r"are not of pixels in \[0, 1\]; give --mean and --std"):
        mpp.import_weights(folder, tmp_path / "x")
    assert mpp.import_weights(folder, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3).normalisation == "as given"


class CfgNode(dict[str, Any]):
    """A stand-in for the yacs class of this name, which SimMIM saves with its weights."""


@pytest.mark.usefixtures("unverified")
def test_configurations_and_metrics_beside_weights(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other objects that projects save with the weights are skipped, whatever their type."""
    package = types.ModuleType("yacs.config")
    package.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", package)
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    config = CfgNode(MODEL=CfgNode(NAME="x"))
    config.__dict__["__immutable__"] = True
    torch.save(
        {"model": state, "config": config, "max_accuracy": np.float64(3), "epochs": np.arange(3)}, tmp_path / "w"
    )
    assert not imported(tmp_path / "w", tmp_path / "e", trust=True).missing


CONFIGS: list[tuple[str | None, str]] = [
    (None, "nor a folder with a config.json beside weights"),
    ("[1]", "config.json: not a mapping"),
    ("{", "config.json: Expecting"),
    ("{}", "config.json: no key 'model_type'; or give the timm model by --model"),
    ('{"model_type": "bert"}', "model_type: expected one of vit, vit_mae"),
    ('{"model_type": "vit", "hidden_size": 0}', "config.json: "),
    ('{"model_type": "vit", "hidden_size": "a"}', "config.json: "),
    ('{"model_type": "swin", "image_size": [1, 2, 3]}', "config.json: "),
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_folders_that_do_not_say_it(number: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    config, message = CONFIGS[number]
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        mpp.import_weights(tmp_path, tmp_path / "e")
    assert "\n" not in str(error.value)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin in it"):
        mpp.import_weights(tmp_path, tmp_path / "e")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(UserError, match=f"{tmp_path}/passwd: No such file"):
        mpp.import_weights(tmp_path, tmp_path / "e")


BEIT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
OF_MAE = {"decoder_embed.weight": torch.ones(2, 2), "decoder_blocks.0.norm1.weight": torch.ones(2)}


def as_simmim(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as SimMIM, BEiT and data2vec pretrain them, with one table of positions for all blocks."""
    found = {k: v for k, v in state.items() if "relative_position_bias_table" not in k}
    table = state["blocks.0.attn.relative_position_bias_table"]
    return found | {"rel_pos_bias.relative_position_bias_table": table, "mask_token": torch.ones(1, 1, 16)}


SIMMIM, DATA2VEC = {"decoder.0.weight": torch.zeros(768, 16, 1, 1)}, {"lm_head.weight": torch.zeros(16, 16)}


@pytest.mark.parametrize(
    ("name", "args", "change", "options", "by", "pool"),
    [
        (NAME, ARGS, lambda s: {"model": s | OF_MAE}, {}, "those of MAE", "avg"),
        (
            "beit_base_patch16_224", BEIT, lambda s: {"model": as_simmim(s) | SIMMIM}, {"global_pool": "token"},
            "those of SimMIM", "avg",
        ),
        (
            "beit_base_patch16_224", BEIT, lambda s: {"model": as_simmim(s) | DATA2VEC}, {"global_pool": "token"},
            "those of data2vec", "avg",
        ),
        (NAME, ARGS, lambda s: s, {"model": f"{NAME}.augreg_in21k"}, "timm's for this tag", "token"),
        ("vit_small_patch16_224", ARGS, lambda s: s, {"model": "vit_small_patch16_224.dino"}, "timm's for this tag", "token"),
    ],
    ids=["MAE", "SimMIM", "data2vec", "a tag", "another tag"],
)  # fmt: skip
@pytest.mark.usefixtures("unverified")
def test_known_weights_know_their_normalisation(
    name: str, args: dict[str, Any], change: Any, options: dict[str, Any], by: str, pool: str, tmp_path: Path
) -> None:
    """All these weights have ImageNet's mean and std, except one tag.

    Encoders pretrained on masked patches use the mean of the patches as embedding.
    """
    pooling = {k: v for k, v in options.items() if k == "global_pool"}
    state = timm.create_model(name, img_size=16, num_classes=0, **args, **pooling).state_dict()
    torch.save(change(dict(state)), tmp_path / "w.pth")
    asked = {"model": name, **{k: v for k, v in options.items() if k == "model"}}
    found = mpp.import_weights(
        tmp_path / "w.pth", tmp_path / "e", args=args | pooling, image_size=(16, 16), trust=True, **asked
    )
    assert found.normalisation == by
    half = options.get("model", "").endswith("augreg_in21k")
    assert (found.mean, found.std) == (
        ([0.5] * 3, [0.5] * 3) if half else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    assert mpp.load_encoder(tmp_path / "e").global_pool == pool


@pytest.mark.usefixtures("unverified")
def test_unknown_weights_need_a_normalisation(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w")
    with pytest.raises(
        UserError, match=r"mean, std: unknown .*--mean 0\.485.*; or name timm's own weights: --model vit_"
    ):
        imported(tmp_path / "w", tmp_path / "e", mean=None)


@pytest.mark.usefixtures("unverified")
def test_beit_published_weights_of_two_normalisations(tmp_path: Path) -> None:
    name, args = "beit_base_patch16_224", BEIT | {"global_pool": "token"}
    state = as_simmim(dict(timm.create_model(name, img_size=16, num_classes=0, **args).state_dict()))
    save_file(state | {"lm_head.weight": torch.zeros(8192, 16)}, tmp_path / "w")

    def take(**options: Any) -> None:
        mpp.import_weights(tmp_path / "w", tmp_path / "e", model=name, args=args, image_size=(16, 16), **options)

    with pytest.raises(UserError, match=r"mean, std: unknown .*; or name timm's own weights: --model beit_"):
        take()
    take(mean=[0.5] * 3, std=[0.5] * 3)
    assert mpp.load_encoder(tmp_path / "e").global_pool == "avg"


@pytest.mark.usefixtures("unverified")
def test_a_projects_normalisation_is_of_three_channels(tmp_path: Path) -> None:
    state = timm.create_model(NAME, img_size=16, num_classes=0, in_chans=1, **ARGS).state_dict()
    save_file(state | OF_MAE, tmp_path / "w")
    with pytest.raises(UserError, match="mean, std: unknown"):
        mpp.import_weights(tmp_path / "w", tmp_path / "e", model=NAME, args=ARGS, image_size=(16, 16), channels=1)


CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


def as_convnext_v2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the ConvNeXt V2 authors' names and their shapes of response normalisation."""
    theirs = {}
    for name, value in state.items():
        renamed = re.sub(r"^stem\.", "downsample_layers.0.", name)
        renamed = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", renamed)
        renamed = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", renamed)
        for own, their in (
            ("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("mlp.grn.weight", "grn.gamma"), ("mlp.grn.bias", "grn.beta"),
            ("head.norm.", "norm."),
        ):  # fmt: skip
            renamed = renamed.replace(own, their)
        theirs[renamed] = value[None, None, None].clone() if "grn" in renamed else value
    return theirs


@pytest.mark.usefixtures("unverified")
def test_convnext_v2s_own_names_are_read_by_timms_filter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("convnextv2_atto", num_classes=0, **CONVNEXT).state_dict()
    theirs = as_convnext_v2(state)

    def take(weights: dict[str, Any], out: str, **options: Any) -> Any:
        torch.save(weights, tmp_path / "w.pth")
        return mpp.import_weights(
            tmp_path / "w.pth", tmp_path / out, model="convnextv2_atto", args=CONVNEXT, image_size=(64, 64), trust=True,
            **options,
        )  # fmt: skip

    for out, weights, prefix in (
        ("e", theirs, ""),
        ("f", {"model": prefixed(theirs, "module.")}, "model.module."),
    ):
        found = take(weights, out)
        assert str(found).startswith(f"{len(state)} of {len(state)} weights, read by timm's checkpoint filter")
        assert (found.normalisation, found.prefix) == ("those of ConvNeXt", prefix)
        loaded = mpp.load_encoder(tmp_path / out).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())

    both = {"model": theirs, "model_ema": dict(theirs)}
    with pytest.raises(UserError, match=r"holds 2 encoders; choose one with --prefix: model\., model_ema\."):
        take(both, "g")
    assert take(both, "g", prefix="model_ema").prefix == "model_ema."
    # as masked pretraining saves them, without the classifier's norm
    without_norm = {name: value for name, value in theirs.items() if not name.startswith("norm.")}
    with pytest.raises(UserError, match="missing"):
        take(without_norm, "h")
    found = take(without_norm, "h", partial=True)
    assert (found.layout, found.missing) == ("timm's checkpoint filter", ["head.norm.weight", "head.norm.bias"])


@pytest.mark.usefixtures("unverified")
def test_a_part_of_the_weights_where_that_is_said(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(without("norm.bias")(state), tmp_path / "w")
    found = imported(tmp_path / "w", tmp_path / "e", partial=True, mean=[0.1, 0.2, 0.3], std=[1, 0.5, 0.5])
    assert found.missing == ["norm.bias"]
    assert str(found).startswith("17 of 18 weights, named as timm does; 1 missing, random now: norm.bias; ")
    assert str(found).endswith("mean [0.1, 0.2, 0.3] and std [1.0, 0.5, 0.5] are as given")
    assert "1 of 18 weights were not in the file and are random: norm.bias." in (tmp_path / "e/README.md").read_text()
    save_file({"a": torch.ones(1)}, tmp_path / "w")
    with pytest.raises(UserError, match="18 of 18 weights .* missing"):
        imported(tmp_path / "w", tmp_path / "f", partial=True)


@pytest.mark.usefixtures("unverified")
def test_what_kind_of_last_norm(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(
        {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v for name, v in state.items()},
        tmp_path / "w",
    )
    with pytest.raises(UserError, match="missing: norm.weight, norm.bias; .*: add global_pool=avg; it holds"):
        imported(tmp_path / "w", tmp_path / "e")
    assert not imported(tmp_path / "w", tmp_path / "e", args=ARGS | {"global_pool": "avg"}).missing
    save_file(state, tmp_path / "w")
    with pytest.raises(UserError, match="missing: fc_norm.weight, fc_norm.bias; .*: add fc_norm=false; it holds"):
        imported(tmp_path / "w", tmp_path / "f", args=ARGS | {"global_pool": "avg"})


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda s: {k: v for k, v in s.items() if k != name}


def looped(state: dict[str, Tensor]) -> Any:
    found: dict[str, Any] = {}
    found |= {f"model{i}": found for i in range(20)}
    return found


class Odd(OrderedDict[str, Tensor]):
    """An object that unpickles as an OrderedDict whose `items` is a number."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"items": 5}


WRONG: list[tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = [
    (without("norm.bias"), {}, r"1 of \d+ weights of vit_tiny_patch16_224: missing: norm\.bias; it holds cls_token"),
    (lambda s: {"a": torch.ones(1)}, {}, r"missing: cls_token, pos_embed, .* and \d+ more; it holds a"),
    (
        lambda s: s,
        {"image_size": (32, 32)},
        r"have other shapes: pos_embed \(1, 17, 16\), expected \(1, 65, 16\); check the",
    ),
    (
        lambda s: s,
        {"image_size": (17, 17)},
        "image_size: vit_tiny_patch16_224 has a stride of 4 px; expected multiples of it, got 17×17",
    ),
    (lambda s: s | {"norm.bias": torch.full((16,), torch.nan)}, {}, r"weights that are not finite: norm\.bias"),
    (lambda s: s | {"norm.bias": torch.full((16,), 1e300, dtype=torch.float64)}, {}, r"not finite: norm\.bias"),
    (lambda s: {"epoch": 3, "args": {"lr": 1}}, {}, "missing: cls_token, .*; it holds no weights by name"),
    (lambda s: [1, 2], {}, "it holds no weights by name"),
    (lambda s: {}, {}, "it holds no weights by name"),
    (looped, {}, "it holds no weights by name"),
    (lambda s: Odd(s), {}, "it holds no weights by name"),
    (
        lambda s: {"student": s, "teacher": dict(s)},
        {},
        r"holds 2 encoders; choose one with --prefix: student\., teacher\.",
    ),
    (
        lambda s: s | {"norm.bias": s["norm.bias"].to(torch.int8)},
        {},
        r"an unsupported data type: norm\.bias \(torch\.int8\)",
    ),
    (
        lambda s: s | {"norm.bias": s["norm.bias"] + 1j},
        {},
        r"an unsupported data type: norm\.bias \(torch\.complex64\)",
    ),
    (lambda s: s | {"norm.bias": s["norm.bias"].to_sparse()}, {}, r"an unsupported data type: norm\.bias"),
    (lambda s: s | {"norm.bias": s["norm.bias"].to("meta")}, {}, r"an unsupported data type: norm\.bias"),
    (lambda s: {"\x1b[31m" + "n" * 999: torch.ones(1)}, {}, r"it holds \\u001b\[31mn{50,80}…$"),
    (lambda s: s, {"model": "vit_tinny_patch16_224"}, "model: timm .* has no model .* Did you mean"),
    (lambda s: s, {"model": "vit_tiny_*"}, r"model: expected a timm name, .*; got 'vit_tiny_\*'"),
    (lambda s: s, {"model": "hf-hub:a/b"}, "model: expected a timm name, .*; got 'hf-hub:a/b'"),
    (lambda s: s, {"model": None}, r"model: give the timm model of these weights \(--model vit_base_patch16_224\)"),
    (lambda s: s, {"mean": [0.5]}, r"mean: must be 3 numbers from 0 to 1, one for each channel; got \[0\.5\]"),
    (lambda s: s, {"mean": [0.5, 0.5, 0.5]}, "mean, std: give both or neither"),
    (lambda s: s, {"mean": [0.5] * 3, "std": [0, 1, 1]}, "std: must be above 0"),
    (lambda s: s, {"args": {"dept": 1}}, "args: vit_tiny_patch16_224 does not take this"),
    (lambda s: s, {"args": {"img_size": 1}}, "args.img_size: use --image-size instead"),
    (lambda s: s, {"args": {"checkpoint_path": "a.pth"}}, "args.checkpoint_path: weights from elsewhere come by"),
]


class AttributeDict(dict[str, Any]):
    """A dictionary subclass of a trainer, as used for settings."""


def test_objects_beside_the_weights_are_left_out(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Trainers' checkpoints also hold paths and settings. These are skipped, and tensors among them are read."""
    torch.save({"state_dict": state, "hyper_parameters": AttributeDict(data=Path("/d"), lr=0.1)}, tmp_path / "pl.ckpt")
    with pytest.warns(
        MppWarning, match=r"objects of .*AttributeDict.* are left out; tensors beside them are read"
    ) as told:
        imported(tmp_path / "pl.ckpt", tmp_path / "e", trust=True)
    assert re.search(r"pathlib\.\w*Path", str(told[0].message))
    assert load_file(tmp_path / "e" / "model.safetensors").keys() == state.keys() - {"head.weight", "head.bias"}
    torch.save({"state_dict": state, "hook": Runs(tmp_path / "mark"), "out": Path("/d")}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"holds more than tensors and plain containers: \w+\.mkdir"):
        imported(tmp_path / "bad.ckpt", tmp_path / "f", trust=True)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_does_not_fit(number: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    change, options, message = WRONG[number]
    torch.save(change(state), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as error:
        imported(tmp_path / "w.pth", tmp_path / "e", trust=True, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither a safetensors file nor one of torch's"),
        (b"<html>", "neither a safetensors file nor one of torch's"),
        ((100).to_bytes(8, "little") + b'{"a": 1' + bytes(200), "no whole safetensors file"),
        (b"\x80\x04", "damaged, or not of torch"),
        ((1 << 40).to_bytes(8, "little") + b'{"a": 1', "no whole safetensors file"),
        (b"PK\x03\x04", "damaged, or not of torch"),
        (b"PK\x05\x06" + bytes(18), "damaged, or not of torch"),
        (None, "no such file or folder"),
    ],
)
def test_files_that_are_none(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "w").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        imported(tmp_path / "w", tmp_path / "e", trust=True)
    assert "\n" not in str(error.value)


def test_a_folder_with_something_in_it_is_left_as_it_is(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine").write_text("")
    with pytest.raises(UserError, match="not empty; give a new folder"):
        imported(tmp_path / "w", tmp_path / "e")
    assert [p.name for p in (tmp_path / "e").iterdir()] == ["mine"]
