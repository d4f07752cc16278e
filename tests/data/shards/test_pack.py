"""`pack` writes every image once with any number of processes, resumes after a stop, and lists other files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mpp.data.shards.pack import pack
from mpp.data.shards.reader import ShardImages
from mpp.errors import UserError
from tests.conftest import ROOT, drawn_image, encoded


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for m in tar:
                found[f"{path.name}/{m.name}"] = tar.extractfile(m).read()  # type: ignore[union-attr]
    return found


def test_every_image_once_with_its_label(image_folder: Path, shards: Path) -> None:
    found = members(shards)
    images = [v for k, v in found.items() if not k.endswith(".cls")]
    assert sorted(images) == sorted(p.read_bytes() for p in image_folder.rglob("*.*"))
    sources = dict(line.rsplit("\t", 1)[::-1] for line in (shards / "sources.tsv").read_text().splitlines())
    for path, place in sources.items():
        shard, name = place.split("\t")
        label = int(found[f"{shard}/{name.split('.')[0]}.cls"])
        assert ["disc", "square"][label] == path.split("/")[0]
        assert found[f"{shard}/{name}"] == (image_folder / path).read_bytes()
    assert [len(ShardImages(str(p), key="k").indexes[0].table) for p in sorted(shards.glob("*.tar"))] == [
        25,
        25,
        10,
    ]


def test_the_order_is_shuffled_and_reproducible(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    pack(str(image_folder), str(tmp_path / "a"), images_per_shard=25, workers=3)
    pack(str(image_folder), str(tmp_path / "b"), images_per_shard=25, workers=1, seed=1)
    assert members(tmp_path / "a") == members(shards)
    assert [p.read_bytes() for p in sorted((tmp_path / "a").glob("*.tar"))] == [
        p.read_bytes() for p in sorted(shards.glob("*.tar"))
    ], "the same call must give the same bytes"
    assert list(members(tmp_path / "b").values()) != list(members(shards).values())


def test_webdataset_reads_it(shards: Path) -> None:
    samples = list(webdataset.WebDataset(str(shards / "shard-000000.tar"), shardshuffle=False, empty_check=False))
    assert len(samples) == 25
    assert {"cls"} < samples[0].keys()


def test_it_goes_on_where_it_stopped(image_folder: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    pack(str(image_folder), str(out), images_per_shard=25, workers=1)
    whole = members(out)
    (out / "shard-000001.tar").unlink()
    (out / "shard-000001.tar.part").write_bytes(b"half")
    again = pack(str(image_folder), str(out), images_per_shard=25, workers=1)
    assert again.shards_written == 1
    assert members(out) == whole
    assert json.loads((out / "dataset.json").read_text())["images"] == 60


def test_what_is_no_image_is_listed_and_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "a" / "deep").mkdir(parents=True)
    (source / "a" / "deep" / "good.jpg").write_bytes(encoded(drawn_image(0), "JPEG"))
    (source / "a" / "wrong-extension.jpg").write_bytes(encoded(drawn_image(1), "PNG"))
    (source / "a" / "page.jpg").write_text("<html>")
    (source / "a" / "empty.png").touch()
    (source / "a" / "notes.txt").write_text("notes")
    (source / "a" / "tab\there.jpg").write_bytes(encoded(drawn_image(0), "JPEG"))
    (source / "a" / "loop").symlink_to(source)
    packed = pack(str(source), str(tmp_path / "out"), workers=1)
    assert packed.images == 2
    assert packed.classes == ["a"]
    assert {path for path, _ in packed.skipped} == {
        "a/page.jpg",
        "a/empty.png",
        "a/notes.txt",
        "'a/tab\\there.jpg'",
        "a/loop",
    }
    assert len((tmp_path / "out" / "skipped.tsv").read_text().splitlines()) == 5
    names = [k.rsplit(".", 1)[1] for k in members(tmp_path / "out") if not k.endswith("cls")]
    assert sorted(names) == ["jpg", "png"], "the name of a member must end with its true format"


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("a/1.png", "2.png"):
        (tmp_path / "in" / name).write_bytes(encoded(drawn_image(0)))
    assert pack(str(tmp_path / "in"), str(tmp_path / "o1"), workers=1).classes == []
    assert pack(str(tmp_path / "in" / "a"), str(tmp_path / "o2"), workers=1).classes == []
    with pytest.raises(UserError, match=r"2\.png is not in a subfolder"):
        pack(str(tmp_path / "in"), str(tmp_path / "o3"), labels=True, workers=1)
    (tmp_path / "in" / "2.png").unlink()
    assert pack(str(tmp_path / "in"), str(tmp_path / "o4"), labels=False, workers=1).classes == []


def test_what_cannot_be_packed(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        pack(str(tmp_path / "none"), str(tmp_path / "o"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found"):
        pack(str(tmp_path / "empty"), str(tmp_path / "o"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"not empty \(holds mine\.txt\)"):
        pack(str(image_folder), str(tmp_path / "full"))
    pack(str(image_folder), str(tmp_path / "o"), workers=1)
    with pytest.raises(UserError, match=r"other settings \(images_per_shard\)"):
        pack(str(image_folder), str(tmp_path / "o"), images_per_shard=7, workers=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="none of 1 could be read as an image"):
        pack(str(tmp_path / "bad"), str(tmp_path / "o2"), workers=1)


def test_hidden_files_and_folders_are_listed_and_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("a/0.png", "b/0.png", "b/._0.png", ".ipynb_checkpoints/0.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded(drawn_image(0)))
    (tmp_path / "pipe.png").rename(tmp_path / "in" / "b" / "pipe.png")
    packed = pack(str(tmp_path / "in"), str(tmp_path / "out"), workers=1)
    assert (packed.images, packed.classes) == (2, ["a", "b"])
    assert packed.skipped == [(".ipynb_checkpoints", "hidden"), ("b/._0.png", "hidden"), ("b/pipe.png", "not a file")]


def test_a_folder_that_may_not_be_read_is_not_passed_over(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("square"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match="square: Permission denied"):
        pack(str(image_folder), str(tmp_path / "out"))


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_packing_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(encoded(drawn_image(0)))
    for i in range(1, 4000):
        os.link(tmp_path / "in" / "0.png", tmp_path / "in" / f"{i}.png")
    words = ["pack", tmp_path / "in", tmp_path / "out", "--images-per-shard", "4", "--workers", "2"]
    packing = subprocess.Popen([sys.executable, "-m", "mpp", *words], env={**os.environ, "PYTHONPATH": str(ROOT)})
    children = Path(f"/proc/{packing.pid}/task/{packing.pid}/children")
    while len(found := children.read_text().split()) < 2:
        assert packing.poll() is None
        time.sleep(0.05)
    assert packing.poll() is None
    packing.kill()
    packing.wait()
    until = time.monotonic() + 20
    while alive := [
        pid for pid in found if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
    ]:
        assert time.monotonic() < until, f"still there: {alive}"
        time.sleep(0.1)


def test_pages_of_a_tiff_become_images(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "stacks").mkdir()
    volume = np.random.default_rng(0).integers(0, 4000, (6, 24, 20), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "stacks" / "volume.tif", volume, photometric="minisblack")
    colours = np.asarray(drawn_image(0))
    tifffile.imwrite(tmp_path / "stacks" / "photo.tif", colours, photometric="rgb")
    with tifffile.TiffWriter(tmp_path / "stacks" / "preview.tif") as writer:
        writer.write(colours, photometric="rgb")
        writer.write(colours[::2, ::2], photometric="rgb", subfiletype=1)
    packed = pack(str(tmp_path / "stacks"), str(tmp_path / "pages"), workers=1, split_pages=True)
    found = members(tmp_path / "pages")
    assert packed.images == 8
    pages = [np.load(io.BytesIO(data)) for name, data in sorted(found.items()) if name.endswith(".npy")]
    assert np.array_equal(np.concatenate(pages), volume)
    whole = sorted(data for name, data in found.items() if not name.endswith(".npy"))
    assert whole == sorted((tmp_path / "stacks" / f"{name}.tif").read_bytes() for name in ("photo", "preview"))
    assert pack(str(tmp_path / "stacks"), str(tmp_path / "whole"), workers=1).images == 3
    with pytest.raises(UserError, match=r"other settings \(split_pages\)"):
        pack(str(tmp_path / "stacks"), str(tmp_path / "pages"), workers=1)


def test_pages_of_all_sizes_and_stacks_without_pages(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "stacks").mkdir()
    rng = np.random.default_rng(0)
    with tifffile.TiffWriter(tmp_path / "stacks" / "sizes.tif") as writer:
        for side in (10, 24, 24, 20):
            writer.write(rng.integers(0, 4000, (side, 20), dtype=np.uint16), photometric="minisblack")
    volume = rng.random((4, 12, 12), dtype=np.float32)
    volume[1] = np.nan
    tifffile.imwrite(tmp_path / "stacks" / "holes.tif", volume, photometric="minisblack")
    tifffile.imwrite(tmp_path / "stacks" / "short.tif", volume[2:], photometric="minisblack", truncate=True)
    colours = rng.random((2, 8, 8, 3), dtype=np.float32)
    colours[..., 1] += 100
    colours[0, 0, 0] = np.nan
    tifffile.imwrite(tmp_path / "stacks" / "colours.tif", colours, photometric="rgb")
    packed = pack(str(tmp_path / "stacks"), str(tmp_path / "pages"), workers=1, split_pages=True)
    assert packed.images == 4 + 3 + 2 + 2
    assert [(place, why.split(",")[0]) for place, why in packed.skipped] == [
        ("holes.tif, image 2", "100% of its values are missing")
    ]
    arrays = [np.load(io.BytesIO(data)) for data in members(tmp_path / "pages").values()]
    corners = [array[:, 0, 0] for array in arrays if array.shape == (3, 8, 8)]
    assert len(corners) == 2
    assert all(red < 1 < 100 < green for red, green, _ in corners), "a missing value must become its channel's mean"
