"""Masks and boxes are read, checked, and cropped like their images."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpp.data.boxes import open_detected
from mpp.data.dense_sets import DenseDataset, WholeDataset, fit_inside, fit_shorter_side
from mpp.data.masks import open_segmented
from mpp.data.places import Detected, Segmented
from mpp.errors import BadImage, UserError

DECODING: dict[str, Any] = {"channels": 3, "formats": ("JPEG", "PNG"), "max_image_pixels": 10**6}
CROPS: dict[str, Any] = {"scale": (0.3, 1.0), "ratio": (0.75, 1.33), "flip": 0.5, "color_jitter": None, **DECODING}


def segmented(folder: Path | str, **keys: Any) -> Segmented:
    return open_segmented((str(folder),), **{"key": "data.train", "classes": None, "ignore_index": 255, **keys})


def detected(*places: Path | str, **keys: Any) -> Detected:
    return open_detected(tuple(map(str, places)), **{"key": "data.train", "classes": None, **keys})


@pytest.fixture
def rectangles(tmp_path: Path) -> Path:
    """Wide, tall and square images of a white rectangle on black, each with its mask and its box."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    entries, annotations = [], []
    for i, (w, h) in enumerate([(60, 40), (40, 60), (50, 50), (64, 48)]):
        x, y = int(rng.integers(5, w - 25)), int(rng.integers(5, h - 25))
        bw, bh = int(rng.integers(8, 20)), int(rng.integers(8, 20))
        mask = np.zeros((h, w), dtype=np.uint8)
        mask[y : y + bh, x : x + bw] = 1
        Image.fromarray(255 * mask).convert("RGB").save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
        entries.append({"id": 10 * i, "file_name": f"{i}.png", "width": w, "height": h})
        annotations.append({"id": i, "image_id": 10 * i, "category_id": 7, "bbox": [x, y, bw, bh], "iscrowd": 0})
    values = {"images": entries, "annotations": annotations, "categories": [{"id": 7, "name": "box"}]}
    (tmp_path / "annotations.json").write_text(json.dumps(values))
    return tmp_path


def keys_of(count: int, images: int) -> list[tuple[int, int, int]]:
    return [(position, 0, position % images) for position in range(count)]


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_masks_are_cropped_and_flipped_as_their_images(rectangles: Path, size: tuple[int, int]) -> None:
    data = segmented(rectangles)
    batch = DenseDataset(data, np.arange(4), 3, size=size, **CROPS).__getitems__(keys_of(40, 4))
    assert not isinstance(batch, UserError)
    white = batch.images.float().mean(1) / 255
    sure = (white < 0.02) | (white > 0.98)  # not on the interpolated edge
    assert sure.float().mean() > 0.7
    assert torch.equal(batch.labels[sure] == 1, white[sure] > 0.5)
    assert batch.labels.dtype == torch.uint8
    assert len({tuple(m.flatten().tolist()) for m in batch.labels}) > 30, "crops must differ"


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_boxes_are_cropped_and_flipped_as_their_images(rectangles: Path, size: tuple[int, int]) -> None:
    data = detected(rectangles)
    assert (data.classes, len(data)) == (["box"], 4)
    batch = DenseDataset(data, np.arange(4), 3, size=size, **CROPS).__getitems__(keys_of(60, 4))
    assert not isinstance(batch, UserError)
    found = 0
    for image, labels in zip(batch.images, batch.labels, strict=True):
        assert labels["boxes"].shape == (len(labels["labels"]), 4)
        for box in labels["boxes"]:
            ys, xs = torch.where(image.float().mean(0) > 127)
            there = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (box - there).abs().max() <= 1.01, "the box must enclose the white pixels"
            found += 1
    assert found > 40


def test_a_sample_depends_on_its_position_alone(rectangles: Path) -> None:
    data = segmented(rectangles)
    dataset = DenseDataset(data, np.arange(4), 3, size=(16, 16), **{**CROPS, "color_jitter": 0.4})
    whole: Any = dataset.__getitems__(keys_of(12, 4))
    for keys in (keys_of(12, 4)[::-1], keys_of(12, 4)[5:7]):
        part: Any = dataset.__getitems__(keys)
        for i, (position, _, _) in enumerate(keys):
            assert torch.equal(part.images[i], whole.images[position])
            assert torch.equal(part.labels[i], whole.labels[position])
    other: Any = DenseDataset(data, np.arange(4), 4, size=(16, 16), **CROPS).__getitems__(keys_of(12, 4))
    assert not torch.equal(other.images, whole.images)


def test_what_is_hardly_visible_or_stands_for_a_crowd_is_no_object() -> None:
    boxes = np.array([[0, 0, 10, 10, 100], [0, 0, 40, 10, 400], [5, 5, 9, 9, 16]], dtype=np.float32)
    data = Detected(["a"], ["x", "y"], [None], [boxes], [np.array([[0, 0], [1, 0], [1, 1]])])
    cut = data.cropped(0, (8, 0, 16, 16), (16, 16), False)
    assert cut["labels"].tolist() == [1], "a fifth of the first box is left, and the third box is a crowd"
    assert cut["boxes"].tolist() == [[0, 0, 16, 10]]
    assert data.cropped(0, (8, 0, 16, 16), (32, 16), True)["boxes"].tolist() == [[0, 0, 16, 20]]
    assert data.cropped(0, (40, 20, 16, 16), (16, 16), False)["boxes"].shape == (0, 4)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3000), st.integers(1, 3000), st.tuples(st.integers(8, 512), st.integers(8, 512)), st.integers(1, 600)
)
def test_fits(h: int, w: int, window: tuple[int, int], side: int) -> None:
    fh, fw = fit_inside(window)(h, w)
    assert 1 <= fh <= window[0]
    assert 1 <= fw <= window[1]
    assert fh == window[0] or fw == window[1]
    fh, fw = fit_shorter_side(side, window)(h, w)
    assert fh >= window[0]
    assert fw >= window[1]
    assert min(fh, fw) >= side
    assert min(fh, fw) == side or fh == window[0] or fw == window[1], "must not be larger than necessary"


def test_whole_images(rectangles: Path) -> None:
    (rectangles / "images" / "1.png").write_bytes(b"no image")
    data = detected(rectangles)
    batch: Any = WholeDataset(data, fit_inside((48, 48)), (48, 48), **DECODING).__getitems__([0, 1, 2, 3])
    assert batch.readable.tolist() == [True, False, True, True]
    assert batch.images.shape == (3, 3, 48, 48)
    assert batch.bad[0].endswith("1.png: not an image of JPEG, PNG")
    for image, labels in zip(batch.images, batch.labels, strict=True):
        ys, xs = torch.where((image.float().mean(0) - 128).abs() > 100)  # the image is padded with grey
        h, w = (labels["size"] * labels["scale"]).round().int().tolist()
        assert (int(ys.max()) + 1, int(xs.max()) + 1) == (h, w)
        ys, xs = torch.where(image[0] > 240)
        there = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (labels["boxes"][0] * labels["scale"] - there).abs().max() <= 1.01
    batch = WholeDataset(segmented(rectangles), fit_shorter_side(24, (16, 16)), None, **DECODING).__getitems__([0, 2])
    assert [tuple(i.shape) for i in batch.images] == [(3, 24, 36), (3, 24, 24)]
    assert [tuple(m.shape) for m in batch.labels] == [(40, 60), (50, 50)], "masks must keep their size"


def test_a_bad_image_is_replaced_and_named(rectangles: Path) -> None:
    (rectangles / "images" / "1.png").write_bytes(b"no image")
    dataset = DenseDataset(segmented(rectangles), np.arange(4), 0, size=(16, 16), **CROPS)
    batch: Any = dataset.__getitems__([(1, 0, 1), (2, 0, 2)])
    assert len(batch.images) == 2
    assert batch.bad == [f"{rectangles}/images/1.png: not an image of JPEG, PNG"]
    for i in (0, 2, 3):
        (rectangles / "images" / f"{i}.png").write_bytes(b"no image")
    error = dataset.__getitems__([(1, 0, 1)])
    assert isinstance(error, UserError)
    assert "not one of the chosen images can be read" in str(error)


def test_boxes_end_with_their_image(rectangles: Path) -> None:
    path = rectangles / "annotations.json"
    values = json.loads(path.read_text())
    for box in ([-10, -20, 40, 50], [300, 5, 10, 10], [5, 5, 10, 0]):
        values["annotations"].append({"image_id": 0, "category_id": 7, "bbox": box})
    path.write_text(json.dumps(values))
    data = detected(rectangles)
    assert data.boxes[0][1:, :4].tolist() == [[0, 0, 30, 30]]
    assert re.search(r"2 \(no pixel of its image\), .*annotations\[5\]\.bbox: \[300, 5, 10, 10\]", str(data.left_out))
    whole = data.cropped(0, (0, 0, 60, 40), (40, 60), False)
    assert whole["boxes"].shape == (2, 4), "parts beyond the image do not count as cut off by the crop"
    for entry in values["images"]:
        del entry["width"], entry["height"]
    path.write_text(json.dumps(values))
    again = detected(rectangles)
    assert again.sizes == data.sizes, "sizes that are not stated must be read from the headers"


def test_grey_masks_of_few_bits(rectangles: Path) -> None:
    """Pillow spreads the values of such masks over 0 to 255, which must be undone."""
    import struct
    import zlib

    for bits, value in ((2, 2), (4, 9)):
        row = bytes([0] + [int(f"{value:0{bits}b}" * (8 // bits), 2)] * (60 * bits // 8))
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60, 40, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(row * 40)), (b"IEND", b"")]  # fmt: skip
        data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
        (rectangles / "masks" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        assert np.flatnonzero(segmented(rectangles).pixels[0]).tolist() == [value]


def test_colours_of_images_with_transparency_change_alone(rectangles: Path) -> None:
    keys = {**CROPS, "color_jitter": 0.5, "channels": 4}
    batch: Any = DenseDataset(segmented(rectangles), np.arange(4), 3, size=(16, 16), **keys).__getitems__(keys_of(8, 4))
    assert (batch.images[:, 3] == 255).all()
    assert not (batch.images[:, :3].float().amax((1, 2, 3)) == 255).all()


def test_a_thin_image_that_would_be_huge_is_a_bad_one(rectangles: Path) -> None:
    Image.new("RGB", (3000, 1)).save(rectangles / "images" / "0.png")
    Image.new("L", (3000, 1)).save(rectangles / "masks" / "0.png")
    dataset = WholeDataset(segmented(rectangles), fit_shorter_side(64, (64, 64)), None, **DECODING)
    batch: Any = dataset.__getitems__([0, 1])
    assert batch.readable.tolist() == [False, True]
    assert "192000×64 pixels once it is scaled, over max_image_pixels 1000000" in batch.bad[0]


def test_classes_of_masks(rectangles: Path) -> None:
    data = segmented(rectangles)
    assert data.classes == ["0", "1"], "the largest value gives the number of classes"
    assert data.pixels.sum(1).tolist() == [2400, 2400, 2500, 3072]
    assert segmented(rectangles, ignore_index=0).pixels[:, 0].tolist() == [0] * 4
    (rectangles / "classes.txt").write_text("nothing\nbox\nnever seen\n\n")
    assert segmented(rectangles).classes == ["nothing", "box", "never seen"]
    with pytest.raises(UserError, match=r"classes\.txt: not the classes of the training data, a, b"):
        segmented(rectangles, classes=["a", "b"])
    (rectangles / "classes.txt").unlink()
    assert segmented(rectangles, classes=["a", "b"]).classes == ["a", "b"]
    palette = Image.open(rectangles / "masks" / "0.png").convert("P")
    palette.putdata(list(np.asarray(Image.open(rectangles / "masks" / "0.png")).ravel()))
    palette.save(rectangles / "masks" / "0.png")
    assert segmented(rectangles).pixels.sum(1).tolist() == [2400, 2400, 2500, 3072], "palette indices are classes"


def test_an_image_on_its_side(rectangles: Path) -> None:
    """The camera's rotation is applied, because the mask belongs to the upright image."""
    (rectangles / "images" / "0.png").unlink()
    lying = Image.new("RGB", (40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(rectangles / "images" / "0.jpg", exif=exif)
    assert len(segmented(rectangles)) == 4
    coco = json.loads((rectangles / "annotations.json").read_text())
    coco["images"][0] |= {"file_name": "0.jpg", "width": 40, "height": 60}
    (rectangles / "annotations.json").write_text(json.dumps(coco))
    with pytest.raises(BadImage, match="60×40 pixels upright, its annotations say 40×60"):
        detected(rectangles).check(0, 60, 40)


def _no_mask(f: Path) -> None:
    (f / "masks" / "2.png").unlink()


def _no_image(f: Path) -> None:
    (f / "images" / "2.png").unlink()


def _twice(f: Path) -> None:
    shutil.copy(f / "images" / "2.png", f / "images" / "2.bmp")


def _other_size(f: Path) -> None:
    Image.new("L", (3, 3)).save(f / "masks" / "2.png")


def _colours(f: Path) -> None:
    Image.new("RGB", (50, 50)).save(f / "masks" / "2.png")


def _broken(f: Path) -> None:
    (f / "masks" / "2.png").write_bytes(b"\x89PNG no")


def _too_large(f: Path) -> None:
    Image.new("L", (50, 50), 9).save(f / "masks" / "2.png")
    (f / "classes.txt").write_text("a\nb\n")


def _same_names(f: Path) -> None:
    (f / "classes.txt").write_text("a\nb\na\n")


def _gap(f: Path) -> None:
    (f / "classes.txt").write_text("a\n\nb\n")


def _all_ignored(f: Path) -> None:
    for path, size in zip(sorted((f / "masks").iterdir()), [(60, 40), (40, 60), (50, 50), (64, 48)], strict=True):
        Image.new("L", size, 255).save(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_no_mask, "1 files without mask, the first: .*images/2.png"),
        (_no_image, "1 files without image, the first: .*masks/2.png"),
        (_twice, "images/2.bmp and .*images/2.png: have the same name"),
        (_other_size, "masks/2.png: 3×3 pixels, its image 50×50"),
        (_colours, "masks/2.png: a mask has one channel of class numbers; this PNG is RGB"),
        (_broken, "masks/2.png: a file of 7 bytes, not a PNG"),
        (_too_large, "masks/2.png: the value 9, where the classes are 0 to 1 and task.ignore_index is 255"),
        (_same_names, "classes.txt:3: a is named twice; one class a line"),
        (_gap, "classes.txt:2: no name; one class a line"),
        (_all_ignored, "every pixel has the value 255, task.ignore_index"),
        (lambda f: shutil.rmtree(f / "masks"), "no folder masks/ in it; task: segment requires images/ and masks/"),
        (lambda f: shutil.rmtree(f), "expected one folder with images/ and masks/"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "images: no images in it"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit(rectangles: Path, change: Any, words: str) -> None:
    change(rectangles)
    with pytest.raises(UserError, match=words) as caught:
        segmented(rectangles)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(("data.train: ", str(rectangles)))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("annotations", 1, "bbox"), [1, 2, -1, 4], r"annotations\[1\].bbox: expected x, y, width, height, no size negative; got \[1, 2, -1, 4\]"),
        (("annotations", 1, "bbox"), [1, 2, 10**400, 4], r"annotations\[1\].bbox: expected"),
        (("annotations", 1, "iscrowd"), "0", r'annotations\[1\].iscrowd: expected 0 or 1; got "0"'),
        (("annotations",), [], "annotations: not one box"),
        (("categories",), [{"id": 7, "name": "box"}, {"id": 7, "name": "ball"}], r"categories\[1\].id: 7 is used twice"),
        (("annotations", 1, "bbox"), [1, 2, 3], r"annotations\[1\].bbox: expected"),
        (("annotations", 1, "bbox"), ["1", 2, 3, 4], r"annotations\[1\].bbox: expected"),
        (("annotations", 1, "image_id"), 99, r"annotations\[1\].image_id: there is no image 99"),
        (("annotations", 1, "category_id"), 99, r"annotations\[1\].category_id: there is no category 99"),
        (("annotations", 1, "category_id"), None, r"annotations\[1\].category_id: expected a number; got null"),
        (("images", 2, "file_name"), "gone.png", r"images\[2\].file_name: no such file: .*gone.png"),
        (("images", 2, "id"), 0, r"images\[2\].id: 0 is used twice"),
        (("images", 2, "width"), "50", r'images\[2\].width: expected pixels; got "50"'),
        (("categories", 0, "name"), 3, r"categories\[0\].name: expected a name; got 3"),
        (("categories",), [], "categories: at least one is needed"),
        (("images", 0, "width"), 0, r"images\[0\]: width, height: must be from 1 to 1000000 pixels"),
        (("images", 0, "width"), 10**400, r"images\[0\]: width, height: must be from 1 to 1000000 pixels"),
        (("images", 1, "file_name"), "0.png", r"images\[1\].file_name: .*0.png is named twice"),
        (("annotations", 1, "area"), -5, r"annotations\[1\].area: must be a number of pixels; got -5"),
        (("annotations", 1, "area"), math.nan, r"annotations\[1\].area: must be a number of pixels; got NaN"),
        (("categories", 0, "name"), "  ", r"categories\[0\].name: an empty label"),
        (("images",), {}, "requires lists of objects named images, annotations and categories"),
        (("images",), [], r"annotations\[0\].image_id: there is no image 0|no images in it"),
    ],
)  # fmt: skip
def test_annotations_that_do_not_fit(rectangles: Path, place: tuple[Any, ...], value: Any, words: str) -> None:
    path = rectangles / "annotations.json"
    values = json.loads(path.read_text())
    inner = values
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=words) as caught:
        detected(rectangles)
    assert str(caught.value).startswith(f"data.train: {path}")


def test_annotations_elsewhere_and_none(rectangles: Path) -> None:
    moved = shutil.move(rectangles / "annotations.json", rectangles / "other.json")
    assert len(detected(moved, rectangles / "images")) == 4
    with pytest.raises(UserError, match=r"annotations.json: No such file"):
        detected(rectangles)
    with pytest.raises(
        UserError, match=r"expected one folder with annotations.json and images/, or \[annotations.json"
    ):
        detected(moved)
    Path(moved).write_text("{")
    with pytest.raises(UserError, match=r"other.json: cannot be read as JSON"):
        detected(moved, rectangles / "images")


def test_validation_has_the_classes_of_the_training(rectangles: Path) -> None:
    assert detected(rectangles, classes=["ball", "box"]).labels[0].tolist() == [[1, 0]]
    with pytest.raises(UserError, match="categories: 'box' is none of the 1 of the training data"):
        detected(rectangles, classes=["ball"])
    with pytest.raises(UserError, match="the value 1, where the classes are 0 to 0"):
        segmented(rectangles, classes=["nothing"])


def test_the_fingerprint_knows_labels_and_not_places(rectangles: Path, tmp_path: Path) -> None:
    before = segmented(rectangles).fingerprint(), detected(rectangles).fingerprint()
    elsewhere = shutil.copytree(rectangles, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    assert (segmented(elsewhere).fingerprint(), detected(elsewhere).fingerprint()) == before
    mask = np.array(Image.open(elsewhere / "masks" / "0.png"))
    mask[0, 0] = 1
    Image.fromarray(mask).save(elsewhere / "masks" / "0.png")
    values = json.loads((elsewhere / "annotations.json").read_text())
    values["annotations"][0]["bbox"][0] += 1
    (elsewhere / "annotations.json").write_text(json.dumps(values))
    assert segmented(elsewhere).fingerprint() != before[0]
    assert detected(elsewhere).fingerprint() != before[1]
