"""Altered copies of images are found, and nothing else."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageEnhance

import mpp
from mpp.cli.app import main
from mpp.data import near_duplicates as search
from mpp.data.near_duplicates import LIMIT, describe, find_pairs
from mpp.errors import MppWarning
from tests.conftest import ROOT

ARCHIVE = ROOT.parent / "shared" / "data" / "photos64.tar.gz"


def cropped(image: Image.Image) -> Image.Image:
    w, h = image.size
    return image.crop((round(0.025 * w), round(0.025 * h), round(0.975 * w), round(0.975 * h)))


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded": lambda image: image,
    "resized": lambda image: image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC),
    "cropped": cropped,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
}


def photo_like(seed: int) -> Image.Image:
    """Return random colours with the spectrum of photographs: amplitude falls as 1/frequency."""
    noise = np.random.default_rng(seed).normal(size=(64, 64, 3))
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
    frequency[0, 0] = 1
    waves = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) / frequency[:, :, None], axes=(0, 1)).real
    waves = waves @ np.array([[1.0, 1.0, 1.0], [0.3, 0.0, -0.3], [0.1, -0.2, 0.1]])  # more brightness than colour
    return Image.fromarray(np.uint8(np.clip(128 + 40 * waves / waves.std(), 0, 255)))


def plant(folder: Path, images: Iterable[Image.Image], copies_each: int) -> None:
    """Write images as I.jpg, and altered copies of the first ones as I-KIND.jpg."""
    folder.mkdir()
    kinds = [kind for kind in ALTERED for _ in range(copies_each)]
    for i, image in enumerate(images):
        image.save(folder / f"{i}.jpg", quality=90)
        if i < len(kinds):
            ALTERED[kinds[i]](image).save(folder / f"{i}-{kinds[i]}.jpg", quality=50 if kinds[i] == "encoded" else 90)


def original(name: str) -> str:
    return Path(name).stem.partition("-")[0]


def judged(folder: Path, planted: int) -> tuple[float, float]:
    """Return precision and recall of the pairs that are found in a folder of `plant`."""
    right = [original(pair.image) == original(pair.other) for pair in mpp.duplicates([str(folder)]).pairs]
    return sum(right) / len(right), sum(right) / planted


def test_planted_copies_are_found(tmp_path: Path) -> None:
    plant(tmp_path / "images", map(photo_like, range(60)), copies_each=10)
    assert judged(tmp_path / "images", planted=40) == (1.0, 1.0)


@pytest.mark.shared
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not there")
def test_copies_planted_among_photographs_are_found(tmp_path: Path) -> None:
    photographs: list[Image.Image] = []
    with tarfile.open(ARCHIVE) as tar:
        for number, member in enumerate(m for m in tar if m.isfile() and "/train/" in f"/{m.name}"):
            if number % 13 == 0:
                photographs.append(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))  # type: ignore[union-attr]
    assert len(photographs) > 1400
    plant(tmp_path / "images", photographs, copies_each=75)
    precision, recall = judged(tmp_path / "images", planted=300)
    assert precision >= 0.95
    assert recall >= 0.95


def test_the_descriptor_keeps_shape_and_colour_but_not_brightness_and_contrast() -> None:
    image = torch.from_numpy(np.asarray(photo_like(0)).copy()).permute(2, 0, 1)[None]
    flatter = (0.5 * image.float() + 60).byte()
    mirrored, red_for_blue = image.flip(-1), image.flip(1)
    blank = torch.full_like(image, 7)
    described = describe(torch.cat([image, flatter, mirrored, red_for_blue, blank]))
    torch.testing.assert_close(described[:4].norm(dim=1), torch.ones(4))
    similarity = described @ described[0]
    assert similarity[1] > 0.99
    assert similarity[2] < LIMIT
    assert similarity[3] < LIMIT
    assert similarity[4] == 0, "images without a pattern are not alike"
    nearly_blank = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)
    nearly_blank[0, :, :8, :8] += 2
    nearly_blank[1, :, 40:48, :8] += 2
    assert not describe(nearly_blank).any()


def test_copies_of_another_aspect_are_found(tmp_path: Path) -> None:
    wide = [photo_like(i).resize((120, 64)) for i in range(4)]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(wide):
        image.save(tmp_path / "images" / f"{i}.png")
        image.resize((32, 32)).save(tmp_path / "images" / f"{i}-square.png")
    assert judged(tmp_path / "images", planted=4) == (1.0, 1.0)


def test_no_image_is_its_own_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was given twice, by another path, or on both sides, is one image. Equal files are two."""
    plant(tmp_path / "photos", map(photo_like, range(3)), copies_each=0)
    (tmp_path / "photos" / "copy.jpg").write_bytes((tmp_path / "photos" / "1.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    for given in (["photos"], ["photos", "./photos/1.jpg"]):
        for similarity in (None, 1.0):
            pairs = mpp.duplicates(given, similarity=similarity).pairs
            assert {(Path(p.image).name, Path(p.other).name) for p in pairs} <= {
                ("1.jpg", "copy.jpg"),
                ("copy.jpg", "1.jpg"),
            }
            assert pairs
    assert {Path(p.image).name for p in mpp.duplicates(["photos"], ["photos"]).pairs} == {"1.jpg", "copy.jpg"}


@pytest.mark.parametrize("with_others", [False, True])
def test_pairs_are_those_of_a_plain_comparison(with_others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 4)  # several blocks, the last of them smaller
    torch.manual_seed(0)
    some = torch.nn.functional.normalize(torch.randn(11, 3), dim=1)
    others = torch.nn.functional.normalize(torch.randn(9, 3), dim=1) if with_others else some
    expected = {
        (i, j)
        for i in range(len(some))
        for j in range(len(others))
        if some[i] @ others[j] >= 0.5 and (with_others or i < j)
    }
    found = find_pairs(some, others if with_others else None, 0.5)
    assert {(i, j) for _, i, j in found} == expected
    assert len(found) == len(expected) > 5
    assert [s for s, *_ in found] == sorted((s for s, *_ in found), reverse=True)


def test_of_too_many_pairs_the_most_similar_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_PAIRS", 10)
    monkeypatch.setattr(search, "BLOCK", 3)
    described = torch.nn.functional.normalize(torch.tensor([[1.0, 0.01 * i] for i in range(9)]), dim=1)
    with pytest.warns(MppWarning, match="more than 10 pairs; the most similar are kept"):
        found = find_pairs(described, None, 0.5)
    assert len(found) == 10
    plain = sorted((float(described[i] @ described[j]) for i in range(9) for j in range(i)), reverse=True)
    assert [s for s, *_ in found] == pytest.approx(plain[:10], abs=1e-6)


def test_the_command(tmp_path: Path) -> None:
    """Two folders are compared; what cannot be read is named; pairs go to CSV, JSON and a picture."""
    plant(tmp_path / "train", map(photo_like, range(6)), copies_each=0)
    plant(tmp_path / "val", map(photo_like, (3, 20, 21)), copies_each=0)
    (tmp_path / "val" / "torn.jpg").write_bytes((tmp_path / "val" / "0.jpg").read_bytes()[:200])
    words = ["duplicates", str(tmp_path / "val"), "--against", str(tmp_path / "train"), "--workers", "1"]
    files = [tmp_path / "pairs.csv", tmp_path / "pairs.png"]
    done = CliRunner().invoke(main, [*words, "-o", str(files[0]), "--picture", str(files[1])])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"1.0000  {tmp_path}/val/0.jpg  {tmp_path}/train/3.jpg"
    assert "1 of 4 images have a near duplicate among 6 others" in done.stdout
    assert [line.split()[-1] for line in done.stdout.splitlines()[-2:]] == [str(file) for file in files]
    assert f"unreadable: {tmp_path}/val/torn.jpg" in done.stderr
    (row,) = csv.DictReader(files[0].open())
    assert (row["similarity"], Path(row["other"]).name) == ("1.0", "3.jpg")
    assert Image.open(files[1]).size[1] > 2 * 64
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert (found["images"], found["others"], len(found["pairs"]), len(found["unreadable"])) == (4, 6, 1, 1)


def test_a_pattern_of_images_and_a_picture_of_no_pairs(tmp_path: Path) -> None:
    plant(tmp_path / "photos", map(photo_like, range(3)), copies_each=0)
    (tmp_path / "old.png").write_bytes(b"old")
    done = CliRunner().invoke(main, ["duplicates", f"{tmp_path}/photos/*.jpg", "--picture", f"{tmp_path}/old.png"])
    assert (done.exit_code, done.output) == (0, "0 pairs among 3 images\n  no picture: there are no pairs\n")
    assert not (tmp_path / "old.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none: no such file or folder"),
        (["photos", "--against", "none"], "none: no such file or folder"),
        (["photos", "--similarity", "1.5"], "--similarity"),
        (["photos", "--picture", "pairs.jpg"], "--picture: pairs.jpg: must end with .png"),
        (["empty"], "no images"),
        (["torn.jpg"], "not one of 1 images can be read; the first: torn.jpg"),
        (["labels.csv"], "labels.csv: a list is not an image; give images or folders"),
        (["photos/*.gif"], "photos/*.gif: no such image"),
        (["photos", "--out", "none/pairs.csv"], "--out: none/pairs.csv: cannot be written"),
        (["photos", "--out", "photos"], "--out: photos: cannot be written"),
        (["photos", "--picture", "none/pairs.png"], "--picture: none/pairs.png: cannot be written"),
    ],
)
def test_what_is_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    (tmp_path / "labels.csv").write_text("image,label\n")
    plant(tmp_path / "photos", [photo_like(0)], copies_each=0)
    done = CliRunner().invoke(main, ["duplicates", *words])
    assert (done.exit_code, message in done.output) == (2, True), done.output
