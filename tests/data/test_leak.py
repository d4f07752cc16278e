"""Validation images are found among the training images by their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mpp.data import leak as leaking
from mpp.data.leak import leak
from mpp.data.readers import AllImages, FileReader, PackedReader
from mpp.data.shards.reader import ShardImages, holds_shards
from mpp.errors import UserError
from tests.conftest import drawn_image, encoded


def written(folder: Path, numbers: list[int]) -> FileReader:
    folder.mkdir(parents=True)
    for i in numbers:
        (folder / f"{i}.png").write_bytes(encoded(drawn_image(i)))
    return FileReader([str(folder / f"{i}.png") for i in numbers])


def test_what_is_shared_is_found_with_its_names(tmp_path: Path) -> None:
    val, train = written(tmp_path / "val", [1, 2, 3, 40]), written(tmp_path / "train", [3, 5, 1, 7])
    found = leak(val, train)
    assert (found.shared, found.checked) == (2, 4)
    assert found.examples == [(str(tmp_path / f"val/{i}.png"), str(tmp_path / f"train/{i}.png")) for i in (1, 3)]
    assert leak(val, written(tmp_path / "other", [11, 12])).shared == 0


def test_images_in_shards_are_found_too(image_folder: Path, shards: Path) -> None:
    packed = PackedReader(ShardImages(str(shards), key="x"))
    files = FileReader(sorted(map(str, image_folder.rglob("*.*g"))))
    found = leak(files, packed)
    assert (found.shared, found.checked) == (60, 60)


def test_images_of_one_colour_do_not_count(tmp_path: Path) -> None:
    for part in ("val", "train"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "black.png").write_bytes(encoded(Image.new("L", (8, 8))))
    found = leak(*(FileReader([str(tmp_path / part / "black.png")]) for part in ("val", "train")))
    assert found.shared == 0


def test_unreadable_files_and_twins(tmp_path: Path) -> None:
    val, train = written(tmp_path / "val", [1, 2]), written(tmp_path / "train", [1])
    (tmp_path / "val" / "twin.png").write_bytes((tmp_path / "val" / "1.png").read_bytes())
    paths = [*val.paths, str(tmp_path / "val" / "twin.png"), str(tmp_path / "gone.png")]
    assert leak(FileReader(paths), train).shared == 2


def test_what_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val, train = written(tmp_path / "val", list(range(32))), written(tmp_path / "train", list(range(100, 132)))
    monkeypatch.setattr(leaking, "MOST_CHECKED", 16)
    assert leak(val, train).checked == 16
    same = [written(tmp_path / f"part{k}", [k]).paths[0] for k in range(1, 13)]
    for path in same:  # all files have one size
        Path(path).write_bytes(Path(path).read_bytes().ljust(4000, b"\0"))
    monkeypatch.setattr(leaking, "MOST_READ", 6)
    reads = []
    counted = FileReader(same)
    monkeypatch.setattr(counted, "read", lambda i: reads.append(i) or FileReader(same).read(i))
    found = leak(FileReader(same), counted)
    assert (found.shared, found.checked, len(reads)) == (6, 12, 6)


def test_all_images_are_those_of_every_place(image_folder: Path, shards: Path) -> None:
    one = str(image_folder / "disc" / "000.png")
    every = AllImages([str(image_folder), str(shards), one], "IMAGES")
    names = [every.name(i) for i in range(len(every))]
    assert len(names) == 121
    assert len(set(names[:-1])) == 120
    assert names[-1] == one
    assert [".tar" in name for name in names] == [True] * 60 + [False] * 61, "those in shards come first"
    for i in (0, 59, 60, 120):
        assert every.read(i)[:2] in (b"\x89P", b"\xff\xd8")
    assert every.sizes().tolist() == [len(every.read(i)) for i in range(len(every))]
    assert every.fingerprint() != AllImages([str(shards), one], "IMAGES").fingerprint()
    with pytest.raises(UserError, match="no such file or folder"):
        AllImages(["/none"], "IMAGES")
    with pytest.raises(UserError, match="IMAGES: no images given"):
        AllImages([], "IMAGES")


def test_places_of_shards(shards: Path, image_folder: Path) -> None:
    assert holds_shards(str(shards))
    assert holds_shards("https://host/{000..009}.tar")
    assert not holds_shards(str(image_folder))
    assert not holds_shards("photo.jpg")
