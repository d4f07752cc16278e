"""The walk of folders: which images it takes, what it leaves out, and that every command takes the same images."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from mpp.data.labeled import open_labeled
from mpp.data.masks import open_segmented
from mpp.data.shards.pack import pack
from mpp.data.shards.reader import ShardImages, images_of
from mpp.data.walk import LeftOut, archives_in, images_among, list_images
from mpp.errors import MppWarning, UserError
from tests.conftest import drawn_image, encoded


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two realistic class folders: 5 cats, one of them behind a link, 2 dogs, and files to leave out."""
    root, store = tmp_path / "classes", tmp_path / "store"
    store.mkdir()
    for name in ("cat/0.jpg", "cat/1.JPEG", "cat/2.jfif", "cat/deep/3.ppm", "dog/0.png", "dog/1.bmp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kinds = {"png": "PNG", "bmp": "BMP", "ppm": "PPM"}
        (root / name).write_bytes(encoded(drawn_image(len(name)), kinds.get(name[-3:], "JPEG")))
    (store / "4.jpg").write_bytes(encoded(drawn_image(9), "JPEG"))
    (root / "cat" / "linked").symlink_to(store)
    (root / "dog" / "loop").symlink_to(root / "dog")
    for name in ("cat/.ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/cat/._0.jpg", "dog/._0.png", "dog/@eaDir/0.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(drawn_image(1), "JPEG"))
    (root / "._cat.tar").write_bytes(b"\0\5\x16\7")
    (root / "readme.txt").write_text("pets")
    (root / "dog" / "raw.heic").write_bytes(b"?")
    return root


CATS = ["cat/0.jpg", "cat/1.JPEG", "cat/2.jfif", "cat/deep/3.ppm", "cat/linked/4.jpg"]
DOGS = ["dog/0.png", "dog/1.bmp"]
LEFT = {
    "._cat.tar": "hidden",
    "__MACOSX": "hidden",
    "cat/.ipynb_checkpoints": "hidden",
    "dog/._0.png": "hidden",
    "dog/@eaDir": "hidden",
    "dog/loop": "the same folder as dog",
    "dog/raw.heic": "not an image by its name",
    "readme.txt": "not an image by its name",
}


def test_what_is_taken_and_what_is_not(classes: Path) -> None:
    files, left_out = list_images(str(classes))
    assert (files, dict(left_out)) == (CATS + DOGS, LEFT)


def test_every_command_takes_the_same(classes: Path, tmp_path: Path) -> None:
    expected = {str(classes / name) for name in CATS + DOGS}
    labeled = open_labeled((str(classes),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    assert {labeled.reader.name(i) for i in range(len(labeled))} == expected
    assert [labeled.classes[label] for label in labeled.labels] == ["cat"] * 5 + ["dog"] * 2
    assert labeled.left_out.found["hidden"] == (5, "._cat.tar")
    images = ShardImages(str(classes), key="k")
    assert {images.name(0, row) for row in range(images.counts[0])} == expected
    assert images.left_out.found["not an image by its name"] == (2, f"{classes}/readme.txt")
    with pytest.warns(MppWarning, match=r"left out: 5 \(hidden\), such as \._cat\.tar"):
        assert set(images_of([str(classes)])) == expected
    packed = pack(str(classes), str(tmp_path / "packed"), workers=1)
    assert (packed.images, packed.classes, dict(packed.skipped)) == (7, ["cat", "dog"], LEFT)
    rows = csv.reader((tmp_path / "packed" / "sources.tsv").read_text().splitlines(), delimiter="\t")
    assert sorted(where for *_, where in rows) == CATS + DOGS


def test_masks_are_walked_as_images_are(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part / ".cache").mkdir(parents=True)
        for name in ("a.png", "._a.png", ".cache/a.png"):
            (tmp_path / part / name).write_bytes(encoded(drawn_image(0, channels=1 if part == "masks" else 3)))
    found = open_segmented((str(tmp_path),), key="k", classes=[str(n) for n in range(255)], ignore_index=255)
    assert found.images == [str(tmp_path / "images" / "a.png")]
    assert found.left_out.found == {"hidden": (4, "._a.png")}


def test_an_array_beside_an_image_of_its_name_is_none() -> None:
    """Names may contain dots: only the extension is not part of the name."""
    names = {"scan.jpg", "scan.npy", "scan.000.npy", "scan.001.npy", "other.npy", "notes.txt"}
    assert images_among(names) == {"scan.jpg", "scan.000.npy", "scan.001.npy", "other.npy"}


def test_a_broken_link_is_an_image_that_cannot_be_read_and_a_pipe_is_none(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "1.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert list_images(str(tmp_path)) == (["folder.jpg/1.png", "gone.jpg"], [("pipe.png", "not a file")])


def test_a_class_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.heic").touch()
    with pytest.raises(UserError, match=r"cat: a class folder without images; left out: 1 \(not an image.*cat/0\.heic"):
        open_labeled((str(tmp_path),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    with pytest.raises(UserError, match=r"no images in it; left out: 1 \(not an image by its name\), 0\.heic"):
        images_of([str(tmp_path / "cat")])


def test_a_folder_keeps_its_own_name_beside_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "z_real").mkdir()
    (tmp_path / "z_real" / "0.png").touch()
    (tmp_path / "b").mkdir()
    for link in ("a_link", "b/link"):
        (tmp_path / link).symlink_to(tmp_path / "z_real")
    same = "the same folder as z_real"
    assert list_images(str(tmp_path)) == (["z_real/0.png"], [("a_link", same), ("b/link", same)])
    (tmp_path / "tab\there").mkdir()
    (tmp_path / "tab\there" / "1.png").touch()
    assert list_images(str(tmp_path / "tab\there")) == (["1.png"], []), "only names below the folder are recorded"


def test_an_archive_beside_its_unpacked_images_is_not_taken_for_them(classes: Path, shards: Path) -> None:
    assert archives_in(str(classes)) == []
    (classes / "cat.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match=r"holds 1 shards, such as cat\.tar, and 7 images, such as cat/0\.jpg"):
        open_labeled((str(classes),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    (classes / "cat.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    images = ShardImages(str(classes), key="k")
    assert images.counts == [25]
    assert images.left_out.found["image in a folder below shards"] == (7, f"{classes}/cat/0.jpg")


def test_what_was_left_out_in_a_line() -> None:
    left_out = LeftOut.of([("a", "hidden"), ("b", "hidden"), ("c.txt", "not an image by its name")])
    assert str(left_out) == "left out: 2 (hidden), such as a; 1 (not an image by its name), c.txt"
    assert left_out
    assert not LeftOut()
