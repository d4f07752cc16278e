"""Unreadable images are found before a run, counted during the run, and named in its results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import mpp
from mpp.data.labeled import Labeled
from mpp.data.labeled_sets import LabeledDataset
from mpp.data.readers import FileReader
from mpp.data.unreadable import check_images, find_coarse_images, unread_classes
from mpp.errors import MppWarning, UserError
from tests.conftest import command, drawn_image, encoded, pretrain_recipe
from tests.finetuning.conftest import run  # noqa: F401 (a fixture)
from tests.finetuning.test_finetuning import recipe, values

READING: dict[str, Any] = {"channels": 3, "formats": ("JPEG", "PNG"), "max_image_pixels": 10**6}
GREY: dict[str, Any] = {**READING, "channels": 1}


def labeled(
    folder: Path, classes: dict[str, int], bad: dict[str, int], missing: dict[str, int] | None = None
) -> Labeled:
    """Write images of each class. The first files of a class are missing or are not images.

    Args:
        folder: Folder in which each class gets a subfolder.
        classes: Number of images by class.
        bad: Number of files at the beginning that are not images, by class.
        missing: Number of files at the beginning that do not exist, by class. None means none.
    """
    paths, labels = [], []
    for label, (name, count) in enumerate(classes.items()):
        for i in range(count):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i >= (missing or {}).get(name, 0):
                path.write_bytes(b"<html>" if i < bad.get(name, 0) else encoded(drawn_image(i)))
            paths.append(str(path))
            labels.append(label)
    return Labeled(FileReader(paths), np.array(labels), list(classes))


def test_a_single_one_is_allowed_and_more_are_not(tmp_path: Path) -> None:
    assert check_images(labeled(tmp_path / "a", {"cat": 9, "dog": 9}, {"cat": 1}), "k", READING, 0.05) == []
    two = labeled(tmp_path / "b", {"cat": 9, "dog": 9}, {"cat": 1, "dog": 1})
    with pytest.raises(UserError, match=r"k: 2 of 18 images looked at cannot be read; the first: .*cat/0\.png: not an"):
        check_images(two, "k", READING, 0.05)
    assert check_images(two, "k", READING, 0.2) == []


def test_files_that_are_not_there_are_all_counted(tmp_path: Path) -> None:
    """Missing files are found among far more files than are opened, because all sizes are read anyway."""
    data = labeled(tmp_path, {"cat": 900, "dog": 100}, {}, {"cat": 60})
    with pytest.raises(UserError, match=r"60 of 1000 images looked at .*cat/0\.png: No such file.* allows 5\.00%"):
        check_images(data, "k", READING, 0.05)
    with pytest.raises(UserError, match=r"k: not one image can be read; the first: .*cat/0\.png: No such file"):
        check_images(labeled(tmp_path / "none", {"cat": 3}, {}, {"cat": 3}), "k", READING, 1.0)


def test_a_class_of_which_nothing_can_be_read_is_named(tmp_path: Path) -> None:
    data = labeled(tmp_path, {"cat": 9, "dog": 9, "owl": 2}, {"owl": 2})
    assert check_images(data, "k", READING, 0.5) == ["k: of owl not one of the images looked at can be read"]
    assert unread_classes(data, [0, 9], range(len(data))) == ["owl"]
    assert unread_classes(data, [0], [0, 1, 19]) == ["owl"]


def images_of_16_bit(folder: Path, largest: int) -> FileReader:
    folder.mkdir()
    for i in range(3):
        array = np.linspace(0, largest, 24 * 24).reshape(24, 24).astype(np.uint16)
        Image.fromarray(array).save(folder / f"{i}.png")
    return FileReader([str(folder / f"{i}.png") for i in range(3)])


def test_coarse_images_are_said(tmp_path: Path) -> None:
    """If 12-bit X-rays in 16-bit files are read as 8 bit, 16 of 4096 grey levels are left."""
    xrays, full = images_of_16_bit(tmp_path / "a", 4095), images_of_16_bit(tmp_path / "b", 60000)
    (line,) = find_coarse_images(xrays, range(3), "k", READING)
    assert line == (
        "k: values of 3 images run from 0 to 4095, of 65535 that their type holds: read as 8 bit they keep 16 grey "
        "levels. data.channels=1 data.value_range=[0,4095] reads all of them"
    )
    (dark,) = find_coarse_images(xrays, range(3), "k", {**GREY, "value_range": "type"})
    assert "they are read as dark; data.value_range=[0,4095] reads them in full" in dark
    np.save(tmp_path / "ct.npy", np.array([[-1000, 2000]], dtype=np.int16))
    ct = FileReader([str(tmp_path / "ct.npy")])
    signed = {**GREY, "formats": ("NPY",), "value_range": "type"}
    (line,) = find_coarse_images(ct, [0], "k", signed)
    assert "data.value_range=[-1000,2000] reads them in full" in line
    assert find_coarse_images(full, range(3), "k", READING) == []
    assert find_coarse_images(xrays, range(3), "k", {**GREY, "value_range": (0.0, 4095.0)}) == []


def tree(folder: Path, bad: dict[str, int], seed: int = 0) -> Path:
    for name in ("disc", "square", "ring"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            image = drawn_image(100 * seed + 10 * len(name) + i)
            (folder / name / f"{i}.png").write_bytes(b"?" if i < bad.get(name, 0) else encoded(image))
    return folder


def test_fine_tuning_looks_before_it_trains(run: Path, tmp_path: Path) -> None:  # noqa: F811
    train, val = tree(tmp_path / "train", {}), tree(tmp_path / "val", {"ring": 10}, 1)
    data = {"data.train": str(train), "data.val": str(val), "optim.steps": 2, "seeds": [0], "beside": []}
    with pytest.raises(UserError, match=r"data\.val: 10 of 30 images .*ring/0\.png"):
        mpp.finetune(recipe(train, tmp_path / "ft", run, **data))
    assert not (tmp_path / "ft").exists()
    with pytest.warns(MppWarning, match="data.val: of ring not one"):
        result = mpp.finetune(recipe(train, tmp_path / "ft", run, **data, **{"data.max_bad_fraction": 0.4}))
    assert result.unread_classes == ("ring",)
    assert "data.val: not one image of ring could be read" in result.table()
    trial = json.loads((tmp_path / "ft" / "pretrained-seed0" / "result.json").read_text())
    assert (trial["unreadable"], trial["unread_classes"]) == (10, ["ring"])
    log = (tmp_path / "ft" / "pretrained-seed0" / "train.log").read_text()
    assert log.count("unreadable, data.val: ") == 10
    assert "not one image of ring could be read" in mpp.report(tmp_path / "ft").read_text()


def test_unreadable_training_images_are_counted_and_too_many_end_the_run(
    run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpp.data.unreadable.LEAST_IN_TRAINING", 5)
    train, val = tree(tmp_path / "train", {"disc": 1, "ring": 1}), tree(tmp_path / "val", {}, 1)
    data = {"data.train": str(train), "data.val": str(val), "optim.steps": 9, "seeds": [0], "beside": []}
    mpp.finetune(recipe(train, tmp_path / "ft", run, **data, **{"data.max_bad_fraction": 0.2}))
    log = (tmp_path / "ft" / "pretrained-seed0" / "train.log").read_text()
    assert re.search(r"\d unreadable images so far, replaced by their neighbours; last: ", log)
    monkeypatch.setattr("mpp.finetuning.run.check_images", lambda *_: [])
    with pytest.raises(UserError, match=r"data\.max_bad_fraction: \d+ of \d+ images could not be read"):
        mpp.finetune(recipe(train, tmp_path / "ft2", run, **data, **{"data.max_bad_fraction": 0.01}))


@pytest.mark.slow
def test_what_each_process_could_not_read_is_named_once(run: Path, tmp_path: Path) -> None:  # noqa: F811
    train = tree(tmp_path / "train", {"disc": 2, "ring": 2})
    named = []
    for processes in (1, 2):
        out, path = tmp_path / f"on-{processes}", tmp_path / "r.yaml"
        given = {
            "data.max_bad_fraction": 0.4,
            "optim.steps": 8,
            "seeds": [0],
            "data.train": str(train),
            "data.val": str(train),
        }
        path.write_text(yaml.safe_dump(values(train, out, run, beside=[], **given)))
        done = command("finetune", path, processes=processes)
        assert done.returncode == 0, done.stderr
        log = (out / "pretrained-seed0" / "train.log").read_text()
        named.append(sorted(re.findall(r"unreadable: (.*)", log)))
    assert len(named[0]) > 8
    assert named[0] == named[1]


def test_a_run_of_unreadable_images_counts_each_once(tmp_path: Path) -> None:
    """Each bad image is replaced by the next good one and counts once, however many others are skipped on the way."""
    data = labeled(tmp_path, {"cat": 8}, {"cat": 4})

    def augment(image: Image.Image) -> np.ndarray:
        return np.asarray(image).transpose(2, 0, 1)

    batch = LabeledDataset(data, np.arange(8), augment, 0, **READING).__getitems__([(i, 0, i) for i in range(8)])
    assert not isinstance(batch, UserError)
    assert (batch.replaced, len(batch.bad)) == (4, 4 + 3 + 2 + 1)


@pytest.mark.parametrize("probe", ["knn", "attentive"])
def test_an_evaluation_counts_what_it_read(probe: str, run: Path, tmp_path: Path) -> None:  # noqa: F811
    """The chance level is that of the images that were read."""
    train, val = tree(tmp_path / "train", {}), tree(tmp_path / "val", {"disc": 4, "ring": 10}, 1)
    keys = {"out": str(tmp_path / "e"), "probes": f"[{probe}]", "controls": False, "data.workers": 0}
    data = {"data.train": str(train), "data.val": str(val), "data.max_bad_fraction": 0.5}
    with pytest.warns(MppWarning) as told:
        result = mpp.evaluate(run, **keys, **data)
    said = "\n".join(str(warning.message) for warning in told)
    assert "14 images could not be read and are left out, such as" in said
    assert "not one of ring in data.val" in said
    assert result.chance == 10 / 16
    found = json.loads((tmp_path / "e" / "result.json").read_text())
    assert (found["val_images"], found["val_images_read"], len(found["unreadable"])) == (30, 16, 14)
    assert found["unread_classes"] == ["ring"]


def test_pretraining_says_what_it_leaves_out_and_how_it_reads(tmp_path: Path) -> None:
    images_of_16_bit(tmp_path / "in", 4095)
    for i in range(24):
        (tmp_path / "in" / f"{i + 10}.png").write_bytes((tmp_path / "in" / "0.png").read_bytes())
    (tmp_path / "in" / "notes.txt").touch()
    mpp.pretrain(pretrain_recipe(tmp_path / "in", tmp_path / "run", **{"optim.steps": 1}))
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"note: data.shards: left out: 1 (not an image by its name), {tmp_path}/in/notes.txt" in log
    assert "warning: data.shards: values of 16 images run from 0 to 4095" in log
