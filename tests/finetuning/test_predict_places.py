"""`mpp predict` of segmenters and detectors: masks that can be used as data, boxes in the pixels of the file."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mpp
from mpp.data.masks import open_segmented
from mpp.errors import UserError
from mpp.finetuning.labels.boxes import BoxesLabels
from mpp.finetuning.predict_places import PlacePredictor
from tests.conftest import command
from tests.finetuning.tasks import test_detect, test_segment


@pytest.fixture(scope="module")
def segmenter(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segment") / "run"
    mpp.finetune(test_segment.recipe(shapes, out))
    return out / "scratch-seed0"


@pytest.fixture(scope="module")
def detector(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("detect") / "run"
    mpp.finetune(test_detect.recipe(shapes, out, **{"optim.steps": 30}))
    return out / "scratch-seed0"


@pytest.fixture
def photos(shapes: Path, tmp_path: Path) -> Path:
    """Return a folder with images of three sizes, one of them in a subfolder, and a file that is no image."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for i, (w, h) in enumerate([(32, 32), (90, 40), (20, 50)]):
        with Image.open(shapes / "val" / "images" / f"{i:05d}.png") as image:
            image.resize((w, h)).save(folder / ("inner" if i == 2 else ".") / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def test_masks(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    rows, unreadable, report = mpp.predict(segmenter, [str(photos), str(photos / "0.png")], report=tmp_path / "out")
    assert report is None
    assert [Path(r["image"]).name for r in rows] == ["0.png", "1.png", "2.png"]
    assert list(unreadable) == [str(photos / "bad.png")]
    predictor = PlacePredictor(segmenter)
    for row in rows:
        with Image.open(row["image"]) as image, Image.open(row["mask"]) as mask:
            assert mask.size == image.size
            assert mask.mode == "P"
            (whole,) = predictor.predict([torch.from_numpy(np.array(image)).permute(2, 0, 1)])
            assert np.array_equal(np.array(mask), whole.numpy())
        with Image.open(str(row["mask"]).replace("/out/masks/", "/out/overlays/")) as overlay:
            assert overlay.size == image.size
    assert (tmp_path / "out" / "masks" / "inner" / "2.png").exists()
    shutil.copytree(photos, tmp_path / "out" / "images", ignore=shutil.ignore_patterns("bad.png"))
    again = open_segmented((str(tmp_path / "out"),), key="k", classes=predictor.classes, ignore_index=255)
    assert len(again) == 3, "predicted masks must be usable as training data"


def test_boxes(detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.finetuning.labels.boxes.LEAST_SCORE", 0.0)
    rows, unreadable, _ = mpp.predict(detector, [str(photos)], report=tmp_path / "out", out=tmp_path / "rows.csv")
    assert len(unreadable) == 1
    assert rows
    sizes = {"0.png": (32, 32), "1.png": (90, 40), "2.png": (20, 50)}
    for row in rows:
        w, h = sizes[Path(row["image"]).name]
        assert 0 <= row["x0"] < row["x1"] <= w
        assert 0 <= row["y0"] < row["y1"] <= h
        assert row["class"] in ("disc", "square", "triangle")
    first = [r["score"] for r in rows if r["image"] == rows[0]["image"]]
    assert first == sorted(first, reverse=True)
    with open(tmp_path / "rows.csv") as f:
        stored = list(csv.DictReader(f))
    assert [list(stored[0]), len(stored)] == [list(BoxesLabels.columns), len(rows)]
    assert {p.name for p in (tmp_path / "out" / "overlays").rglob("*.png")} == set(sizes)


@pytest.mark.slow
def test_the_command(detector: Path, segmenter: Path, photos: Path, tmp_path: Path) -> None:
    done = command("predict", segmenter, photos, "--report", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [list(r) for r in rows] == [["image", "mask"]] * 3
    assert "unreadable: " in done.stderr
    done = command("predict", segmenter, photos)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--report: this model makes masks; give a folder for them\n"


def test_what_is_refused(detector: Path, segmenter: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--views: only 1 is possible for .*, which predicts places in an image"):
        mpp.predict(detector, [str(photos)], views=2)
    shutil.copy(photos / "0.png", photos / "0.bmp")
    with pytest.raises(UserError, match="several images are named 0; their pictures would overwrite"):
        mpp.predict(segmenter, [str(photos)], report=tmp_path / "out")
    with pytest.raises(UserError, match=r"not one image can be read; the first: .*bad\.png: not an image"):
        mpp.predict(detector, [str(photos / "bad.png")])
    (segmenter / "encoder" / "recipe.yaml").rename(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"recipe\.yaml: No such file"):
        mpp.predict(segmenter, [str(photos)], report=tmp_path / "out")
    (tmp_path / "recipe.yaml").rename(segmenter / "encoder" / "recipe.yaml")
    (segmenter / "encoder" / "head.safetensors").unlink()
    for look in (mpp.verify, lambda trial: mpp.predict(trial, [str(photos)], report=tmp_path / "out")):
        with pytest.raises(UserError, match=r"head\.safetensors: No such file"):
            look(segmenter)
