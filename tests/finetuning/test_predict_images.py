"""Predictions are those of the fine-tuned model, and the report shows its mistakes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import mpp
from mpp.errors import UserError
from mpp.finetuning.predict_images import Predictor
from tests.conftest import ROOT, command, drawn_image, encoded
from tests.finetuning.test_finetuning import ARGS, recipe


@pytest.fixture(scope="module")
def trial(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fine") / "tuned"
    architecture = {"name": "vit_tiny_patch16_224", "args": ARGS}
    mpp.finetune(recipe(shards, out, "scratch", seeds=[0], architecture=architecture))
    return out / "scratch-seed0"


def test_rows_are_what_the_model_says(trial: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = image_folder / "disc"
    rows, unreadable, report = mpp.predict(trial, [str(folder)], top=2, out=tmp_path / "p" / "rows.csv")
    assert (unreadable, report) == ({}, None)
    assert [row["image"] for row in rows] == sorted(str(p) for p in folder.iterdir())
    model = timm.create_model(f"local-dir:{trial / 'encoder'}", pretrained=True).eval()
    predictor = Predictor(trial)
    pixels = predictor.crops(Path(rows[3]["image"]).read_bytes())
    assert pixels.shape == (1, 3, 16, 16)
    with torch.no_grad():
        p = model((pixels.float() / 255 - 0.5) / 0.5).softmax(-1)[0]
    assert predictor.classes == ["disc", "square"]
    assert rows[3]["class"] == predictor.classes[int(p.argmax())]
    assert rows[3]["probability"] == pytest.approx(float(p.max()), abs=1e-6)
    assert rows[3]["class_2"] != rows[3]["class"]
    assert rows[3]["probability_2"] == pytest.approx(float(p.min()), abs=1e-6)
    with open(tmp_path / "p" / "rows.csv") as f:
        assert [r["class"] for r in csv.DictReader(f)] == [r["class"] for r in rows]


def test_more_views_are_means(trial: Path, image_folder: Path) -> None:
    data = next((image_folder / "disc").iterdir()).read_bytes()
    one, two, ten = (Predictor(trial, views) for views in (1, 2, 10))  # type: ignore[arg-type]
    centre, five = one.crops(data), ten.crops(data)
    assert five.shape[0] == 5
    assert torch.equal(five[:1], centre)
    assert len({tuple(c.flatten().tolist()) for c in five}) == 5, "expected crops at five places"
    both = (one.probabilities(centre[None]) + one.probabilities(centre[None].flip(-1))) / 2
    torch.testing.assert_close(two.probabilities(centre[None]), both)
    each = [two.probabilities(crop[None, None]) for crop in five]
    torch.testing.assert_close(ten.probabilities(five[None]), torch.cat(each).mean(0, keepdim=True))


def test_the_report(trial: Path, image_folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "images"
    shutil.copytree(image_folder, wrong)
    rows, _, _ = mpp.predict(trial, [str(wrong)])
    for row in rows:  # move every image into the folder of the class that is not predicted
        name = Path(row["image"])
        other = {"disc": "square", "square": "disc"}[row["class"]]
        shutil.move(name, tmp_path / f"{other}-{name.name}")
    for path in tmp_path.glob("*-*.*"):
        kind, _, name = path.name.partition("-")
        shutil.move(path, wrong / kind / name)
    rows, _, report = mpp.predict(trial, [str(wrong)], report=tmp_path / "report")
    assert report is not None
    assert report.accuracy == 0
    assert report.counts.sum() == 60
    assert np.trace(report.counts) == 0
    assert len(report.mistakes) == 24, "expected no more than a picture holds"
    surest = [float(p.probabilities.max()) for p, _ in report.mistakes]
    assert surest == sorted(surest, reverse=True)
    assert surest[0] == pytest.approx(max(r["probability"] for r in rows))
    with open(tmp_path / "report" / "confusion.csv") as f:
        table = list(csv.reader(f))
    assert table[0][1:] == ["disc", "square"]
    assert [[int(v) for v in row[1:]] for row in table[1:]] == report.counts.tolist()
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.width > 300


@pytest.mark.slow
def test_unreadable_images_are_named(trial: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    good.write_bytes(encoded(drawn_image(1)))
    bad.write_bytes(b"not an image")
    done = command("predict", trial, good, bad)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "image,class,probability"
    assert done.stdout.splitlines()[1].startswith(f"{good},")
    assert f"unreadable: {bad}: " in done.stderr
    done = command("predict", trial, bad)
    assert done.returncode == 2
    assert "not one image can be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_inputs(trial: Path, shards: Path, image_folder: Path, tmp_path: Path) -> None:
    from tests.conftest import pretrain_recipe

    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 1}))
    with pytest.raises(UserError, match="has no classifier with class names; give a fine-tuned model"):
        mpp.predict(tmp_path / "run", [str(image_folder)])
    with pytest.raises(UserError, match=r"nowhere\.png: no such file or folder"):
        mpp.predict(trial, ["nowhere.png"])
    with pytest.raises(UserError, match="no images in it"):
        mpp.predict(trial, [str(tmp_path / "run" / "checkpoints")])
    stray = tmp_path / "ring" / "a.png"
    stray.parent.mkdir()
    stray.write_bytes(encoded(drawn_image(1)))
    with pytest.raises(UserError, match=r"--report: .*a\.png: its folder is none of the classes \(disc, square\)"):
        mpp.predict(trial, [str(stray)], report=tmp_path / "r")
    with pytest.raises(UserError, match="views: expected 1, 2 or 10; got 3"):
        mpp.predict(trial, [str(stray)], views=3)
    with pytest.raises(UserError, match="neither a run nor an exported encoder"):
        mpp.predict(image_folder, [str(stray)])
    config = json.loads((trial / "encoder" / "config.json").read_text())
    assert config["label_names"] == ["disc", "square"]


def test_a_recipe_from_elsewhere_runs_nothing(trial: Path, tmp_path: Path) -> None:
    shutil.copytree(trial / "encoder", tmp_path / "theirs")
    recipe = tmp_path / "theirs" / "recipe.yaml"
    recipe.write_text(f"task: !!python/object/apply:os.mkdir ['{tmp_path / 'mark'}']\n")
    image = tmp_path / "a.png"
    image.write_bytes(encoded(drawn_image(1)))
    predictions, *_ = mpp.predict(tmp_path / "theirs", [str(image)])
    assert len(predictions) == 1
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_odd_names(trial: Path, tmp_path: Path) -> None:
    """Dollars are no formulas, file names that are not text are kept, and an unwritable output is refused."""
    odd = shutil.copytree(trial, tmp_path / "odd")
    config = odd / "encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "label_names": ["a$_$b", "c"]}))
    for name in ("a$_$b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(encoded(drawn_image(1)))
    _, _, report = mpp.predict(odd, [str(tmp_path / "images")], report=tmp_path / "report")
    assert report is not None
    assert report.accuracy == 0.5
    strange = os.fsencode(tmp_path) + b"/\xff.png"
    with open(strange, "wb") as f:
        f.write(encoded(drawn_image(1)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-m", "mpp", "predict", str(trial), strange], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert strange in done.stdout
    with pytest.raises(UserError, match=f"{tmp_path}: Is a directory"):
        mpp.predict(trial, [os.fsdecode(strange)], out=tmp_path)
