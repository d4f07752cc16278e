"""Folders and CSV files of images are read directly, as if the images were in shards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import mpp
from mpp.data import files
from mpp.data.shards.pack import pack
from mpp.data.shards.reader import ShardImages
from mpp.errors import BadImage, UserError
from mpp.runs.records import read_metrics
from tests.conftest import command, pretrain_recipe


def opened(*spec: Path | str) -> ShardImages:
    return ShardImages(tuple(map(str, spec)), key="data.shards")


def test_every_file_once(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILES_PER_SHARD", 25)
    images = opened(image_folder)
    assert images.counts == [25, 25, 10]
    names = [images.name(s, r) for s, count in enumerate(images.counts) for r in range(count)]
    assert sorted(names) == sorted(str(p) for p in image_folder.rglob("*.*"))
    assert all(images.read(s, 3) == Path(images.name(s, 3)).read_bytes() for s in range(3))
    assert {Path(images.name(0, r)).parent.name for r in range(25)} == {"disc", "square"}, "the classes must be mixed"


def test_the_fingerprint_is_of_names_and_sizes_not_of_the_place(image_folder: Path, tmp_path: Path) -> None:
    first = opened(image_folder).fingerprint
    copied = shutil.copytree(image_folder, tmp_path / image_folder.name)
    assert opened(copied).fingerprint == first
    file = next(copied.glob("disc/*.jpg"))
    file.write_bytes(file.read_bytes() + b"\0")
    assert opened(copied).fingerprint != first
    file.write_bytes(file.read_bytes()[:-1])
    assert opened(copied).fingerprint == first
    file.rename(file.with_name("zzz.jpg"))
    assert opened(copied).fingerprint != first


def test_files_that_change_or_go(image_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "f")
    images = opened(folder)
    first, second = (Path(images.name(0, row)) for row in (0, 1))
    first.unlink()
    second.write_bytes(b"short")
    with pytest.raises(BadImage, match="No such file"):
        images.read(0, 0)
    with pytest.raises(BadImage, match="changed since the run began: 5 bytes, it had"):
        images.read(0, 1)


def test_what_is_no_file_of_its_own(image_folder: Path, tmp_path: Path) -> None:
    """Pipes would block and devices have no end, so both are bad images. No place may be named twice."""
    os.mkfifo(tmp_path / "pipe.jpg")
    photo = next(image_folder.rglob("*.jpg"))
    (tmp_path / "list.csv").write_text(f"image\n{photo}\npipe.jpg\n/dev/zero\n\n")
    images = opened(tmp_path / "list.csv")
    assert images.counts == [3]
    for row in range(3):
        if images.name(0, row) != str(photo):
            with pytest.raises(BadImage, match="not a file"):
                images.read(0, row)
    (tmp_path / "list.csv").write_text("image\na\0b.jpg\n")
    with pytest.raises(UserError, match="list.csv:2: image: a zero byte"):
        opened(tmp_path / "list.csv")
    for twice in (f"{image_folder}/", str(image_folder)):
        with pytest.raises(UserError, match="is named twice"):
            opened(image_folder, twice)
    with pytest.raises(UserError, match="overlap: one contains the other"):
        opened(image_folder, image_folder / "disc")


def test_shards_that_are_not_all_of_a_folder(shards: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "s")
    shutil.copy(next(image_folder.rglob("*.jpg")), folder / "a.jpg")
    with pytest.raises(UserError, match=r"holds 3 shards, .* and 1 images, such as a\.jpg\. .*s/\*\.tar' names"):
        opened(folder)
    assert len(opened(f"{folder}/*.tar").names) == 3
    pack(str(image_folder), str(tmp_path / "part"), images_per_shard=20, workers=1, part=(1, 2))
    with pytest.raises(UserError, match="packing is incomplete"):
        opened(tmp_path / "part")
    (folder / "a.jpg").unlink()
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"1 of its 3 shards are missing, such as shard-000001\.tar; .*s/\*\.tar means"):
        opened(folder)
    assert len(opened(f"{folder}/*.tar").names) == 2


def test_a_name_with_braces_that_is_there(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "out {1..2} [a]")
    assert len(opened(folder).names) == 3
    with pytest.raises(UserError, match=r"out 1 \[b\]': no such"):
        opened(tmp_path / "out {1..2} [b]")


def test_a_manifest(image_folder: Path, tmp_path: Path) -> None:
    some = sorted(image_folder.rglob("*.jpg"))[:7]
    (tmp_path / "list.csv").write_text("".join(["image,source\n", *(f"{p},web\n" for p in some)]))
    images = opened(tmp_path / "list.csv")
    assert images.counts == [7]
    assert sorted(images.name(0, r) for r in range(7)) == sorted(map(str, some))
    for text, message in (
        ("", "list.csv:1: needs the column image; got nothing"),
        ("file\na.jpg\n", "list.csv:1: needs the column image; got file"),
        ("image,x\na.jpg\n", "list.csv:2: 1 columns, where the first line has 2"),
        ("image\n", "list.csv: no images in it"),
    ):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            opened(tmp_path / "list.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="data.shards: '.*empty': no such shard, and no image"):
        opened(tmp_path / "empty")
    with pytest.raises(UserError, match="data.shards: '.*none.csv': no such file or folder$"):
        opened(tmp_path / "none.csv")


@pytest.mark.slow
def test_a_run_on_files(image_folder: Path, tmp_path: Path) -> None:
    """With workers, a resumed run has the losses of an uninterrupted run. It does not resume with more files."""
    folder = shutil.copytree(image_folder, tmp_path / "photos")
    changes = {"data.workers": 2, "optim.steps": 8, "checkpoint_every_steps": 4, "log_every_steps": 1}
    mpp.pretrain(pretrain_recipe(folder, tmp_path / "whole", **changes))
    mpp.pretrain(pretrain_recipe(folder, tmp_path / "run", **changes))
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    done = command("pretrain", tmp_path / "run/recipe.yaml", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    first, again = ([m["loss"] for m in read_metrics(tmp_path / out)] for out in ("whole", "run"))
    assert first == again
    shutil.copy(folder / "disc/002.jpg", folder / "disc/more.jpg")
    done = command("pretrain", tmp_path / "run/recipe.yaml", "--resume", "auto")
    assert done.returncode == 2
    assert "data" in done.stderr
