"""`mpp models`, and every family of the support table from pretraining to a loaded export."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import mpp
from mpp.cli.app import main
from mpp.encoders.support import COLUMNS, FAMILIES, Family, markdown, table
from mpp.inspection.survey import tiny_command
from mpp.objective import contract
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from tests.conftest import ROOT, pretrain_recipe
from tests.contracts.test_encoders import SLOW

CLEAN_PROCESS = {"Swin", "MLP-Mixer", "CoAtNet", "PVT v2", "BEiT", "EVA-02", "Hiera", "ConvNeXt V2", "DeiT, distilled"}
"""Families whose export is verified in a clean process, which takes 5 s each. The others are loaded in this process."""


def said(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["models", *words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_the_table_is_that_of_the_page() -> None:
    text = said()
    assert text.splitlines()[0].split("  ")[0] == COLUMNS[0]
    assert len(text.splitlines()) == len(FAMILIES) + 1
    page = (ROOT / "docs" / "encoders.md").read_text()
    stored = re.search(r"<!-- support table: .* -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert stored
    assert stored[1] == markdown()
    assert "fails" not in text


def test_a_failed_check_shows_in_the_table() -> None:
    rows = table()
    rows[0]["ways"]["token"] = ["no leak: a hidden pixel reaches a prediction"]
    assert "| fails |" in markdown(rows).splitlines()[2]


def test_patterns_list_names() -> None:
    assert "pvt_v2_b0" in said("pvt_v2_*").split()
    assert "no model 'zzz*'" in said("zzz*", code=2)


def test_a_known_family_is_probed_just_now() -> None:
    text = said("vit_tiny_patch16_224")
    assert "VisionTransformer, 5.5 M parameters, probed at 32×48 px" in text
    assert "stem: patch_embed (NLC, 16 px)" in text
    assert "ways of masking: token, pixel, drop, joining" in text
    assert "no hidden pixel reaches a prediction" in text
    assert "may be trained: yes\n" in text


def test_a_family_nobody_tried_gets_a_clear_answer() -> None:
    text = said("regnety_002")
    assert "stem: stem (NCHW, 2 px)" in text
    assert "never run on a RegNet; mpp models --check regnety_002 runs them" in text
    assert "may be trained: yes, with a warning" in text
    assert "none that can have mask tokens" in said("resnet18")
    text = said("efficientnet_b0")
    assert "features: 320 channels" in text, "features are widened only after pooling"
    assert "may be trained: yes, with a warning" in text
    text = said("pit_ti_224")
    assert "none that can have mask tokens" in text, "its patches overlap: seven cells of nine pixels"


@pytest.mark.slow
def test_a_deep_model_does_not_overflow_in_the_check() -> None:
    assert "may be trained: yes, with a warning" in said("hgnetv2_b6")


@pytest.mark.parametrize("name", ["pit_ti_224", "efficientnet_b0"])
def test_families_nobody_tried_train_and_are_verified(name: str, shards: Path, tmp_path: Path) -> None:
    """In pit_ti, features and embedding share memory. In efficientnet_b0, the last layer is outside the features."""
    given = {"encoder": {"name": name}, "data.image_size": 64, "corruption": "pixel_patch", "optim.steps": 2}
    with pytest.warns(mpp.MppWarning, match="no contract test has seen"):
        run = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **given))
    assert mpp.export(run.out, tmp_path / "export").difference <= 1e-4


def test_what_may_not_be_trained_says_why() -> None:
    assert "may be trained: no: " in said("crossvit_tiny_240")
    assert "they do not tile the image" in said("inception_v3")
    assert "expected the name of one timm model" in said("--check", "vit_tiny*", code=2)
    assert "expected the name of one timm model" in said("", code=2)
    assert "Did you mean" in said("regnety_02", code=2)
    assert "requires a name" in said("--check", code=2)


@pytest.mark.slow
def test_the_contract_runs_on_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said("--check", "regnetx_002")
    for way in ("token", "pixel"):
        for name in contract.CHECKS:
            assert f"  {way}: {name}: holds" in text

    def broken(subject: Any, way: str) -> None:
        raise contract.Broken("on purpose")

    monkeypatch.setitem(contract.CHECKS, "learns", broken)
    assert "token: learns: on purpose" in said("--check", "regnetx_002", code=2)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.title, marks=[pytest.mark.slow] if f.title in SLOW else []) for f in FAMILIES],
)
def test_every_family_pretrains_exports_and_loads(family: Family, shards: Path, tmp_path: Path) -> None:
    """The command that `mpp models` prints is run."""
    words = shlex.split(tiny_command(family))[2:]
    changes = {"data.shards": str(shards), "out": str(tmp_path / "run")}
    command = [*words, *(f"{k}={json.dumps(v)}" for k, v in changes.items())]
    command[0] = str(ROOT / command[0])
    result = CliRunner().invoke(main, ["pretrain", *command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run" / "encoder"
    plain = mpp.load_encoder(folder).eval()
    from safetensors.torch import load_file

    reference = load_file(folder / "reference.safetensors")
    with torch.no_grad():
        features = plain.forward_features(reference["images"])
    assert torch.equal(features, reference["features"])


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.title in CLEAN_PROCESS], ids=lambda f: f.title)
def test_every_family_is_verified_in_a_clean_process_and_fine_tunes(
    family: Family, shards: Path, tmp_path: Path
) -> None:
    from mpp.inspection.survey import tiny_overrides

    recipe = ROOT / "recipes" / "pretrain" / "simmim_vit_b16.yaml"
    run = mpp.pretrain(
        recipe, preset="tiny", **tiny_overrides(family), **{"data.shards": str(shards), "out": str(tmp_path / "run")}
    )
    assert mpp.export(run.out, tmp_path / "export").difference <= 1e-5
    values = {
        "job": "finetune", "out": str(tmp_path / "ft"), "encoder": str(tmp_path / "export"), "seeds": [0],
        "data": {
            "train": str(shards), "val": str(shards), "image_size": list(family.image_size), "workers": 0,
            "labels_per_class": 4,
        },
        "optim": {"steps": 2, "global_batch_size": 8},
        "pool": "token" if "distilled" in family.title else "mean",
    }  # fmt: skip
    with pytest.warns(mpp.MppWarning, match="the same images as data.train"):
        tuned = mpp.finetune(check_recipe(values, FinetuneRecipe))
    assert tuned.score.keys() == {"pretrained", "scratch"}
    if "Swin" in family.title or "distilled" in family.title:  # each takes seconds
        assert mpp.verify(tmp_path / "ft" / "pretrained-seed0").difference <= 1e-5
