"""Arrays with any number of channels and bits are read in full and scaled to one range, or refused by their headers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mpp
from mpp.data.decoding.arrays import read_array, scaled
from mpp.data.decoding.decode import decode_crop, decode_cut
from mpp.data.shards.pack import pack
from mpp.errors import BadImage, UserError
from mpp.runs.records import read_metrics
from tests.conftest import Runs, encoded, pretrain_recipe

READING: dict[str, Any] = {"formats": ("PNG", "TIFF", "NPY"), "max_image_pixels": 10_000}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def whole(width: int, height: int) -> tuple[int, int, int, int]:
    return 0, 0, width, height


def cut(data: bytes, channels: int, value_range: Any = "type", box: Any = whole) -> torch.Tensor:
    found = decode_cut(data, box, (4, 4), channels=channels, value_range=value_range, **READING)
    assert found.is_whole
    return found.pixels


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64", ">u2"])
@pytest.mark.parametrize("channels", [1, 2, 5, 13])
@pytest.mark.parametrize("kind", ["npy", "npy, channels first", "tiff", "tiff, planes", "tiff, deflated"])
def test_every_number_arrives(dtype: str, channels: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 100, (6, 7, channels)).astype(dtype)
    stored = np.moveaxis(pixels, -1, 0) if "first" in kind or "planes" in kind else pixels
    stored = stored[..., 0] if channels == 1 and "first" not in kind and "planes" not in kind else stored
    options: dict[str, Any] = (
        {"planarconfig": "separate", "photometric": "minisblack"} if "planes" in kind else {"photometric": "minisblack"}
    )
    options |= {"compression": "zlib"} if "deflated" in kind else {}
    if "tiff" in kind and channels == 1:
        stored, options = pixels[..., 0], {"photometric": "minisblack"}
    data = npy(np.ascontiguousarray(stored)) if "npy" in kind else tiff(stored, **options)
    found = cut(data, channels, (0.0, 100.0))
    expected = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) * 2.55
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


def test_ranges() -> None:
    deep = np.array([[0, 65535, 32768]], dtype=np.uint16)
    assert cut(npy(deep), 1)[0, 0].tolist() == pytest.approx([0, 255, 255 * 32768 / 65535])
    assert cut(npy(np.array([[-1.0, 0.5, 2.0]])), 1)[0, 0].tolist() == [0, 127.5, 255]
    hounsfield = np.array([[-2000, -1000, 0, 1000]], dtype=np.int16)
    assert cut(npy(hounsfield), 1, (-1000.0, 1000.0))[0, 0].tolist() == [0, 0, 127.5, 255]
    # a narrow range far from zero, for which float32 has too few digits
    far = np.array([[16_777_217.0, 16_777_218.0]])
    assert cut(npy(far), 1, (16_777_216.0, 16_777_218.0))[0, 0].tolist() == [127.5, 255]
    # grey PNGs of 16 bit keep all 16 bits
    png = encoded(Image.fromarray(deep))
    assert cut(png, 1)[0, 0].tolist() == pytest.approx([0, 255, 255 * 32768 / 65535])
    colours = encoded(Image.new("RGB", (3, 2), (10, 20, 30)))
    assert cut(colours, 3)[:, 0, 0].tolist() == cut(colours, 3, (0, 255))[:, 0, 0].tolist() == [10, 20, 30]
    with pytest.raises(BadImage, match="read as 8 bit, which data.value_range is not"):
        cut(colours, 3, (0.0, 65535.0))


def test_missing_values_get_the_mean_of_their_channel() -> None:
    """A few NaN, or GDAL's nodata, at the border of a tile do not make it a bad image."""
    tile = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    holed = tile.copy()
    holed[0, 0, 0], holed[1, 2, 3] = np.nan, np.inf
    found = cut(npy(np.moveaxis(holed, 0, -1)), 2, (0.0, 255.0))
    expected = torch.from_numpy(tile.copy())
    expected[0, 0, 0], expected[1, 2, 3] = float(tile[0].flat[1:].mean()), float(tile[1].flat[:-1].mean())
    torch.testing.assert_close(found, expected)
    deep = np.array([[[10, 20, 30], [-9999, 40, 50]]], dtype=np.int16)
    box: Any = {"channels": 1, "value_range": (0.0, 255.0), **READING}
    assert decode_cut(npy(deep), whole, (4, 4), nodata=-9999, **box).pixels[0, 1, 0] == 30
    tagged = tiff(deep[0], photometric="minisblack", extratags=[(42113, "s", 6, "-9999", True)])
    assert cut(tagged, 1, (0.0, 255.0))[0, 1].tolist() == [30, 40, 50]
    with pytest.raises(BadImage, match="67% of its values are missing"):
        decode_cut(npy(np.array([[7, 7, 1]])), whole, (4, 4), nodata=7, **box)


def test_crops_and_resizes_like_other_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    as_numbers, as_pixels = (
        decode_crop(npy(pixels), lambda w, h: (2, 1, 9, 10), (5, 4), channels=3, **more, **READING)
        for more in ({"value_range": (0.0, 255.0)}, {})
    )
    assert as_pixels.dtype == torch.uint8
    assert as_numbers.shape == as_pixels.shape == (3, 5, 4)
    assert (as_numbers - as_pixels.float()).abs().max() <= 1
    edge = np.zeros((8, 8), dtype=np.float32)
    edge[:, 4:] = 1
    resized = decode_crop(npy(edge), whole, (16, 16), channels=1, value_range="type", **READING)
    assert resized.min() == 0
    assert resized.max() == 255, "bicubic resizing overshoots, so the values must be clipped"


def test_tiffs_whose_numbers_are_no_brightness() -> None:
    pixels = np.zeros((4, 5), np.uint8)
    for options, message in (
        ({"photometric": "miniswhite"}, "a TIFF of MINISWHITE"),
        ({"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "a TIFF of PALETTE"),
        ({"photometric": "minisblack", "extratags": [(274, "H", 1, 6, True)]}, "a TIFF with orientation 6"),
    ):
        with pytest.raises(BadImage, match=message):
            cut(tiff(pixels, **options), 1)


def test_a_tiff_whose_data_are_not_what_its_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    data = tiff(np.zeros((4, 5, 2), np.uint8), photometric="minisblack")
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda self: np.zeros((0, 4, 5, 2), np.uint8))
    with pytest.raises(BadImage, match="an array of 0×4×5×2"):
        cut(data, 2)


BAD: list[tuple[bytes, int, str]] = [
    (npy(np.zeros((4, 4, 3), np.uint8)), 5, "an array of 4×4×3; expected 5 channels, first or last"),
    (npy(np.zeros((2, 4, 4, 5), np.uint8)), 5, "an array of 2×4×4×5; expected 5 channels"),
    (npy(np.zeros((4, 4), np.complex64)), 1, "values of complex64"),
    (npy(np.zeros((4, 4), bool)), 1, "values of bool"),
    (npy(np.array([[np.nan, 1], [np.inf, -np.inf]])), 1, "75% of its values are missing, more than 50%"),
    (npy(np.zeros((0, 4), np.uint8)), 1, "4×0 pixels"),
    (npy(np.zeros((101, 100), np.uint8)), 1, "100×101 pixels, over max_image_pixels 10000"),
    (npy(np.zeros((4, 4), np.uint8))[:-1], 1, "cut off"),
    (b"\x93NUMPY\x03\0", 1, "npy of version"),
    (b"\x93NUMPY", 1, "."),
    (b"\x93NUMPY\x01\0\x10\0{'descr': '<u1',", 1, "."),
    (b"II*\0" + bytes(30), 5, "."),
    (b"MM\0*\xff\xff\xff\xff", 5, "."),
    (encoded(Image.new("RGB", (3, 2))), 5, "not a TIFF, .npy or DICOM; expected 5 channels"),
    (b"", 1, "empty file"),
    (b"", 5, "not a TIFF, .npy or DICOM"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_is_no_image(number: int) -> None:
    data, channels, message = BAD[number]
    with pytest.raises(BadImage, match=message) as error:
        cut(data, channels)
    assert "\n" not in str(error.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([Runs(tmp_path / "mark")], dtype=object), allow_pickle=True)
    with pytest.raises(BadImage, match="values of object"):
        cut(stream.getvalue(), 1)
    assert not (tmp_path / "mark").exists()


def test_a_small_file_that_says_it_is_large() -> None:
    """The file is refused by its header, before memory is allocated."""
    header = npy(np.zeros((1, 1), np.float64)).replace(b"(1, 1)", b"(9, 9)")
    with pytest.raises(BadImage, match="cut off"):
        cut(header, 1)


def test_as_eight_bit() -> None:
    """Without a value range, arrays of 8 bit are ordinary images, and deeper arrays are refused."""
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    assert torch.equal(cut(npy(pixels), 3, None), torch.from_numpy(pixels).permute(2, 0, 1))
    assert cut(npy(pixels[..., 0]), 1, None).shape == (1, 4, 5)
    with pytest.raises(BadImage, match="values of uint16: give their range by data.value_range"):
        cut(npy(pixels.astype(np.uint16)), 3, None)
    with pytest.raises(BadImage, match="not an image of PNG"):
        decode_cut(npy(pixels), whole, (4, 4), channels=3, formats=("PNG",), max_image_pixels=100)
    assert read_array(b"\xff\xd8", channels=3, **READING) is None
    assert scaled(np.full((1, 1, 1), 300, np.uint16), (0.0, 255.0)).item() == 255


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12-bit images with five channels in two class folders, as TIFF and .npy, for training and for validation."""
    folder = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:20, :20] / 20
    for i in range(50):
        target = folder / ("train" if i < 40 else "val") / ("high" if i % 2 else "low")
        target.mkdir(exist_ok=True, parents=True)
        waves = np.stack([np.sin(rows * a + columns * b + i) for a, b in rng.uniform(2, 8, (5, 2))])
        pixels = (2048 + (1500 if i % 2 else 700) * waves).astype(np.uint16)
        if i % 3:
            (target / f"{i}.npy").write_bytes(npy(pixels))
        else:
            (target / f"{i}.tif").write_bytes(tiff(pixels, photometric="minisblack"))
    return folder


CHANGES: dict[str, Any] = {"data.channels": 5, "data.value_range": [0, 4095]}


@pytest.mark.slow
def test_pretraining_fine_tuning_and_prediction(bands: Path, tmp_path: Path) -> None:
    """Images with five channels work in every command, packed or as files, with labels and classes."""
    packed = pack(str(bands / "train"), str(tmp_path / "shards"), images_per_shard=20, workers=1)
    assert (packed.images, packed.classes, packed.skipped) == (40, ["high", "low"], [])
    recipe = pretrain_recipe(tmp_path / "shards", tmp_path / "run", **CHANGES, **{"optim.steps": 12})
    mpp.pretrain(recipe)
    found = [m["loss"] for m in read_metrics(tmp_path / "run")]
    assert min(found[-3:]) < found[0]
    assert (tmp_path / "run" / "reconstructions").exists()
    data: dict[str, Any] = {"data.train": str(bands / "train"), "data.val": str(bands / "val")}
    data |= CHANGES | {"data.image_size": 16, "data.workers": 0}
    values = {"job": "finetune", "out": str(tmp_path / "ft"), "encoder": str(tmp_path / "run"), "seeds": [0]}
    tuned = mpp.finetune(values, **data, **{"optim.steps": 3, "optim.epochs": None})
    assert tuned.state == "finished"
    rows, unreadable, _ = mpp.predict(tmp_path / "ft/pretrained-seed0", [str(bands / "val/low")])
    assert len(rows) == 5
    assert not unreadable
    assert {row["class"] for row in rows} <= {"high", "low"}
    del data["data.value_range"]  # then the encoder's is used
    stored = (tmp_path / "ft/recipe.yaml").read_text()
    again = mpp.finetune(values | {"out": str(tmp_path / "ft2")}, **data, **{"optim.steps": 3, "optim.epochs": None})
    assert (tmp_path / "ft2/recipe.yaml").read_text().replace("ft2", "ft") == stored
    assert again.score == tuned.score
    scored = mpp.evaluate(tmp_path / "run", out=str(tmp_path / "ev"), **{**data, "probes": ["knn"]})
    assert scored.scores["encoder"]
    found_at = mpp.export(tmp_path / "run", tmp_path / "e")
    assert found_at.difference < 1e-5


def test_what_is_not_for_such_images(bands: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"target": {"name": "mean_color"}}, "target: mean_color takes classes from pixels of 8 bit"),
        ({"data.value_range": [5, 5]}, "two finite numbers, the smaller one first"),
        ({"data.channels": 0}, "data.channels"),
        ({"data.channels": 5000}, "data.channels"),
        ({"data.mean": [0.5] * 3}, "has 3 values for 5 channels"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain_recipe(bands, tmp_path / "run", **CHANGES | changes)
