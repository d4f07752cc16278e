"""Labeled images from class folders and from shards, and small subsets of them."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import create_transform

from mpp.data.labeled import open_labeled
from mpp.data.labeled_sets import CentreDataset, LabeledDataset
from mpp.errors import BadImage, UserError
from tests.conftest import drawn_image, encoded

READING = {"channels": 3, "formats": ("JPEG", "PNG"), "max_image_pixels": 10**6}


def opened(spec: Path | str, classes: list[str] | None = None) -> object:
    return open_labeled((str(spec),), key="data.train", classes=classes, cache_dir=None, cache_limit_bytes=1e9)


def test_folder_and_shards_hold_the_same(image_folder: Path, shards: Path) -> None:
    folder, packed = opened(image_folder), opened(shards)
    assert folder.classes == packed.classes == ["disc", "square"]
    pairs = [{(d.reader.read(i), int(d.labels[i])) for i in range(60)} for d in (folder, packed)]
    assert pairs[0] == pairs[1]


def test_subsets_are_drawn_by_the_seed(shards: Path) -> None:
    data = opened(shards)
    few = data.subset(labels_per_class=5, fraction=None, seed=0)
    assert np.bincount(data.labels[few]).tolist() == [5, 5]
    assert (few == data.subset(labels_per_class=5, fraction=None, seed=0)).all()
    assert (few != data.subset(labels_per_class=5, fraction=None, seed=1)).any()
    more = data.subset(labels_per_class=9, fraction=None, seed=0)
    assert set(few) < set(more), "a larger subset of a seed must contain the smaller one"
    assert np.bincount(data.labels[data.subset(labels_per_class=None, fraction=0.2, seed=0)]).tolist() == [
        6,
        6,
    ]
    assert len(data.subset(labels_per_class=None, fraction=None, seed=0)) == 60
    with pytest.raises(UserError, match=r"data\.labels_per_class: 31, but class 'disc' has 30 images"):
        data.subset(labels_per_class=31, fraction=None, seed=0)


def tar_with(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_labels_in_json_and_by_name(tmp_path: Path) -> None:
    image = encoded(drawn_image(0))
    members = {}
    for i, name in enumerate(["cat", "dog", "cat"]):
        members |= {f"{i}.png": image, f"{i}.json": json.dumps({"label": name}).encode()}
    data = opened(tar_with(tmp_path / "a.tar", members))
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({}, "no label beside it"),
        ({"0.json": b"{}"}, "has no 'label'"),
        ({"0.json": b"[1"}, "has no 'label'"),
        ({"0.json": b"[" * 100000}, "has no 'label'"),
        ({"0.cls": b"\xff"}, "its .cls is not text in UTF-8"),
        ({"0.cls": b" "}, "an empty label"),
        ({"0.cls": b"a\0b"}, r"label 'a\\x00b' holds the character"),
        ({"0.json": rb'{"label": "\ud800"}'}, "holds the character"),
        ({"0.cls": b"--5"}, "label '--5' is none of"),
        ({"0.cls": "²".encode()}, "label '²' is none of"),
        ({"0.cls": b"9" * 5000}, "is none of the 2 classes"),
        ({"0.json": b'{"label": 1.5}'}, "a whole number or a name; got 1.5"),
        ({"0.cls": b"-1"}, "label -1 is negative"),
        ({"0.cls": b"7"}, "label '7' is none of the 2 classes"),
        ({"0.cls": b"bird"}, "label 'bird' is none of the 2 classes"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, label: dict[str, bytes], message: str) -> None:
    path = tar_with(tmp_path / "a.tar", {"0.png": encoded(drawn_image(0)), **label})
    with pytest.raises(UserError, match=message) as error:
        opened(path, classes=["cat", "dog"])
    assert "a.tar: 0.png" in str(error.value)


def test_numbers_of_two_packed_sets_mean_the_names_they_had(tmp_path: Path) -> None:
    from mpp.data.shards.pack import pack

    for part, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(encoded(drawn_image(ord(name))))
        pack(str(tmp_path / part), str(tmp_path / f"{part}-shards"), workers=1)
    for train in ("train", "train-shards"):
        classes = opened(tmp_path / train).classes
        val = opened(tmp_path / "val-shards", classes=classes)
        assert sorted(val.labels.tolist()) == [0, 2]
    with pytest.raises(UserError, match="label 'c' is none of the 2 classes"):
        opened(tmp_path / "train-shards", classes=["a", "b"])


def test_two_packed_sets_side_by_side_have_the_classes_of_both(tmp_path: Path) -> None:
    from mpp.data.shards.pack import pack

    for part, names in (("pets", ("cat", "dog")), ("fruit", ("apple", "dog"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(encoded(drawn_image(len(name))))
        pack(str(tmp_path / part), str(tmp_path / f"{part}-shards"), workers=1)
    both = (str(tmp_path / "pets-shards"), str(tmp_path / "fruit-shards"))
    data = open_labeled(both, key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    assert data.classes == ["apple", "cat", "dog"]
    assert sorted(data.labels.tolist()) == [0, 1, 2, 2]


def test_what_else_lies_in_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(drawn_image(0)))
    (tmp_path / "a" / "._0.png").write_bytes(b"of a file browser")
    (tmp_path / "b" / "1.png").symlink_to(tmp_path / "gone.png")
    data = opened(tmp_path)
    assert (data.classes, len(data.labels)) == (["a", "b"], 3)
    assert data.fingerprint()
    with pytest.raises(BadImage, match="No such file"):
        data.reader.read(2)
    assert len(opened(tmp_path, classes=["a", "b", "c"]).labels) == 3

    listing = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match="b: Permission denied"):
        opened(tmp_path)


def test_ids_are_no_class_numbers(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "a.tar", {"0.png": encoded(drawn_image(0)), "0.cls": b"2000000"})
    with pytest.raises(UserError, match="labels up to 2000000, but only 1 different ones"):
        opened(path)


def test_folders_that_cannot_be_used(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(UserError, match="neither .* shards nor a folder for each class"):
        opened(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a class folder without images"):
        opened(tmp_path)
    with pytest.raises(UserError, match="no such class in the training data"):
        opened(image_folder, classes=["disc", "triangle"])


def test_augmentation_depends_on_the_position_alone(shards: Path) -> None:
    data = opened(shards)
    augment = create_transform((3, 16, 16), is_training=True, use_prefetcher=True, auto_augment="rand-m9-mstd0.5-inc1")
    dataset = LabeledDataset(data, np.arange(60), augment, 0, **READING)
    together = dataset.__getitems__([(p, 0, 7) for p in range(6)])
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    alone = dataset.__getitems__([(4, 0, 7)])
    assert torch.equal(alone.images[0], together.images[4])
    assert len({i.numpy().tobytes() for i in together.images}) > 3
    assert together.images.dtype == torch.uint8


def test_bad_images(tmp_path: Path) -> None:
    for name, data in (
        ("a/0.png", encoded(drawn_image(0))),
        ("a/1.png", b"bad"),
        ("b/2.png", encoded(drawn_image(1))),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    data = opened(tmp_path)
    augment = create_transform((3, 16, 16), is_training=True, use_prefetcher=True)
    batch = LabeledDataset(data, np.arange(3), augment, 0, **READING).__getitems__([(0, 0, 1)])
    assert batch.labels.tolist() == [1], "the label must be that of the replacing image"
    assert "1.png: not an image" in batch.bad[0]
    val = CentreDataset(data, (16, 16), 1.0, **READING).__getitems__([0, 1, 2])
    assert val.labels[val.readable].tolist() == [0, 1]
    assert val.readable.tolist() == [True, False, True]
    with pytest.raises(UserError, match="not one of the chosen images can be read"):
        raise LabeledDataset(data, np.array([1]), augment, 0, **READING).__getitems__([(0, 0, 0)])
