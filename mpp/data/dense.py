"""Images labeled at places: a mask beside each, or COCO's boxes; their crops for training, and whole for validation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mpp.data.decode import GREY, Box, decode_crop, decode_pillow, random_box
from mpp.data.files import open_regular, read_regular
from mpp.data.labeled import FileReader, LabeledBatch, class_name, draw_fraction, file_size
from mpp.data.walk import LeftOut, images_below
from mpp.errors import BadImage, UserError, one_line
from mpp.rng import Purpose, stream

CLASSES = "classes.txt"
MOST_SIDE_PX = 1_000_000
"""Of an image, in annotations (a guess)."""
MOST_OUTSIDE_PX = 1
"""By which a box may run past its image, from rounding."""
LEAST_VISIBLE = 0.25
"""A box of which a crop leaves less is no longer one (guess)."""


@dataclass(frozen=True)
class _Dense:
    """Images, and the classes of their places."""

    images: list[str]
    classes: list[str]
    left_out: LeftOut = field(default_factory=LeftOut, compare=False, kw_only=True)
    """Files that are neither images nor masks, and annotations that have no pixel of their image"""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def reader(self) -> FileReader:
        return FileReader(self.images)

    @property
    def strata(self) -> np.ndarray:
        """(images,) int64, what a part held out is stratified by: nothing."""
        return np.zeros(len(self.images), dtype=np.int64)

    def subset(self, *, labels_per_class: int | None, fraction: float | None, seed: int) -> np.ndarray:
        """Numbers of the images to train on, ascending."""
        return draw_fraction(len(self.images), fraction, seed)


@dataclass(frozen=True)
class Segmented(_Dense):
    """Images with a mask each: PNG files of one channel, whose values are class numbers."""

    masks: list[str]
    pixels: np.ndarray
    """(images, classes) int64: pixels of each class"""
    ignored: int = 0
    """Pixels with the value that counts for nothing"""

    def fingerprint(self) -> str:
        """What the images and their labels are, not where they lie."""
        words = (*self.classes, *(f"{os.path.basename(p)}:{file_size(p)}" for p in (*self.images, *self.masks)))
        return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape") + self.pixels.tobytes()).hexdigest()

    def check(self, i: int, width: int, height: int) -> None:
        """Sizes were compared when the data was opened."""

    def cropped(self, i: int, box: Box, size: tuple[int, int], flip: bool) -> Tensor:
        """(H, W) uint8. BadImage."""
        left, top, w, h = box
        mask = torch.from_numpy(_read_mask(self.masks[i]))
        cut = F.resized_crop(mask[None], top, left, h, w, list(size), InterpolationMode.NEAREST_EXACT)[0]
        return cut.flip(-1) if flip else cut

    def whole(self, i: int, scale: float, size: tuple[int, int]) -> Tensor:
        """(h, w) uint8 of the file. BadImage."""
        return torch.from_numpy(_read_mask(self.masks[i]))


@dataclass(frozen=True)
class Detected(_Dense):
    """Images with boxes, from an annotation file in COCO's format."""

    sizes: list[tuple[int, int] | None]
    """(width, height) that the annotations state, or else the file's header."""
    boxes: list[np.ndarray]
    """(n, 5) float32 of each image: x0, y0, x1, y1 in pixels, area"""
    labels: list[np.ndarray]
    """(n, 2) int64 of each image: class, whether it stands for a crowd"""
    cut: list[str] = field(default_factory=list, compare=False)
    """Where the boxes are that run past their image: they were cut off at its edge"""

    def fingerprint(self) -> str:
        """What the images and their labels are, not where they lie."""
        words = (*self.classes, *(f"{os.path.basename(p)}:{file_size(p)}" for p in self.images))
        digest = hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape"))
        for boxes, labels in zip(self.boxes, self.labels, strict=True):
            digest.update(boxes.tobytes() + labels.tobytes() + b"\0")
        return digest.hexdigest()

    def check(self, i: int, width: int, height: int) -> None:
        """BadImage where the file is not of the size that its boxes were drawn on."""
        stated = self.sizes[i]
        if stated is not None and stated != (width, height):
            raise BadImage(f"{width}×{height} pixels upright, its annotations say {stated[0]}×{stated[1]}")

    def cropped(self, i: int, box: Box, size: tuple[int, int], flip: bool) -> dict[str, Tensor]:
        """boxes (n, 4) float32 in the crop's pixels, labels (n,) int64; crowds and what is hardly visible left out."""
        left, top, w, h = box
        there = torch.from_numpy(self.boxes[i][:, :4].copy())
        kind, crowd = torch.from_numpy(self.labels[i].copy()).unbind(1)
        before = (there[:, 2] - there[:, 0]) * (there[:, 3] - there[:, 1])
        there = there - torch.tensor([left, top, left, top])
        there = there.clamp_min(0).minimum(torch.tensor([w, h, w, h], dtype=torch.float32))
        sides = there[:, 2:] - there[:, :2]
        scale = torch.tensor([size[1] / w, size[0] / h])
        # a detector's boxes are a pixel at least
        kept = (sides.prod(1) >= LEAST_VISIBLE * before) & (sides * scale >= 1).all(1) & (crowd == 0)
        there = there[kept] * scale.repeat(2)
        if flip:
            there = torch.stack([size[1] - there[:, 2], there[:, 1], size[1] - there[:, 0], there[:, 3]], 1)
        return {"boxes": there, "labels": kind[kept]}

    def whole(self, i: int, scale: float, size: tuple[int, int]) -> dict[str, Tensor]:
        """boxes in the file's pixels, labels, iscrowd, area; how the image was scaled, and its size (h, w)."""
        kind, crowd = torch.from_numpy(self.labels[i].copy()).unbind(1)
        return {
            "boxes": torch.from_numpy(self.boxes[i][:, :4].copy()),
            "labels": kind,
            "iscrowd": crowd,
            "area": torch.from_numpy(self.boxes[i][:, 4].copy()),
            "scale": torch.tensor(scale),
            "size": torch.tensor(size),
        }


# ---- masks -------------------------------------------------------------------------------------------------------


def open_segmented(spec: tuple[str, ...], *, key: str, classes: list[str] | None, ignore_index: int) -> Segmented:
    """A folder with `images/` and `masks/`, in which `images/a/b.jpg` belongs to `masks/a/b.png`.

    classes: those of the training data, which validation must share; None: the lines of `classes.txt` beside the two
    folders, or as many as the largest value says. All masks are read once. UserError with the file for what does not
    fit together.
    """
    root = _one_folder(spec, key, "images/ and masks/")
    for part in ("images", "masks"):
        if not os.path.isdir(os.path.join(root, part)):
            raise UserError(f"{key}: {root}: no folder {part}/ in it; task: segment wants images/ and masks/")
    images, left_out = images_below(os.path.join(root, "images"))
    if not images:
        raise UserError(f"{key}: {root}/images: no images in it" + (f"; {left_out}" if left_out else ""))
    masks, other_files = images_below(os.path.join(root, "masks"))
    left_out.add_all(other_files, "masks/")
    of_image = _by_stem(images, os.path.join(root, "images"), key)
    of_mask = _by_stem(masks, os.path.join(root, "masks"), key)
    for one, other, word in ((of_image, of_mask, "mask"), (of_mask, of_image, "image")):
        alone = [path for stem, path in one.items() if stem not in other]
        if alone:
            reason = f"; {left_out}" if left_out else ""
            raise UserError(f"{key}: {len(alone)} files without {word}, the first: {alone[0]}{reason}")
    masks = [of_mask[stem] for stem in of_image]
    images = list(of_image.values())
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        found = list(pool.map(_examine, images, masks))
    faults = [fault for fault, _ in found if fault]
    if faults:
        raise UserError(f"{key}: {faults[0]}" + (f" (and {len(faults) - 1} more)" if faults[1:] else ""))
    counts = np.stack([count for _, count in found])
    ignored = int(counts[:, ignore_index].sum())
    counts[:, ignore_index] = 0
    listed = _listed_classes(root)
    if classes and listed and listed != classes:
        raise UserError(f"{key}: {root}/{CLASSES}: not the classes of the training data, {', '.join(classes[:5])} …")
    known = classes or listed
    used = np.flatnonzero(counts.any(0))
    if len(used) == 0:
        raise UserError(f"{key}: {root}/masks: every pixel has the value {ignore_index}, task.ignore_index")
    if known is None:
        known = [str(n) for n in range(int(used[-1]) + 1)]
    if used[-1] >= len(known):
        first = masks[int(np.flatnonzero(counts[:, used[-1]])[0])]
        raise UserError(
            f"{key}: {first}: the value {used[-1]}, where the classes are 0 to {len(known) - 1} "
            f"and task.ignore_index is {ignore_index}"
        )
    return Segmented(images, known, masks, counts[:, : len(known)], ignored, left_out=left_out)


def _one_folder(spec: tuple[str, ...], key: str, what: str) -> str:
    if len(spec) != 1 or not os.path.isdir(spec[0]):
        raise UserError(f"{key}: {', '.join(spec)}: wants one folder with {what}")
    return spec[0]


def _by_stem(paths: list[str], root: str, key: str) -> dict[str, str]:
    """Path below `root` without its ending -> file."""
    found: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(os.path.relpath(path, root))[0]
        if stem in found:
            raise UserError(
                f"{key}: {found[stem]} and {path}: which of them? Names must differ by more than the ending"
            )
        found[stem] = path
    return found


def _listed_classes(root: str) -> list[str] | None:
    path = os.path.join(root, CLASSES)
    if not os.path.exists(path):
        return None
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8, from byte {error.start} on") from error
    names = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    while names and not names[-1]:
        names.pop()
    for number, name in enumerate(names, 1):
        if name:
            class_name(name, f"{path}:{number}")
        if not name or name in names[: number - 1]:
            raise UserError(f"{path}:{number}: {'no name' if not name else f'{name} a second time'}; one class a line")
    if not names or len(names) > 255:
        raise UserError(f"{path}: {len(names)} classes; allowed are 1 to 255")
    return names


def _examine(image: str, mask: str) -> tuple[str | None, np.ndarray]:
    """(what is wrong, pixels of each value 0 to 255)."""
    try:
        values = _read_mask(mask)
    except BadImage as error:
        return f"{mask}: {error}", np.zeros(256, dtype=np.int64)
    fault = None
    size = _size_of(image)
    if size is not None and values.shape != size[::-1]:
        fault = f"{mask}: {values.shape[1]}×{values.shape[0]} pixels, its image {size[0]}×{size[1]}"
    return fault, np.bincount(values.ravel(), minlength=256)


def _size_of(image: str) -> tuple[int, int] | None:
    """(width, height) by its header, upright; None for a bad image, which training passes over and counts."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
            # of TIFFs Pillow has the size upright already
            turned = opened.format != "TIFF" and opened.getexif().get(0x0112, 1) >= 5
            return (height, width) if turned else (width, height)
    except Exception:  # decoders raise anything on hostile bytes
        return None


def _read_mask(path: str) -> np.ndarray:
    """(h, w) uint8. BadImage."""
    try:
        with open(path, "rb") as file:
            start = file.read(26)
        if len(start) < 26:
            raise BadImage(f"a file of {len(start)} bytes, not a PNG")
        depth, colours = start[24:26]
        with Image.open(path, formats=("PNG",)) as mask:
            if mask.mode not in ("L", "P", "1"):
                raise BadImage(f"a mask has one channel of class numbers; this PNG is {mask.mode}")
            # Pillow spreads grey of 2 and 4 bits over 0 to 255
            return np.array(mask, dtype=np.uint8) // ({2: 85, 4: 17}.get(depth, 1) if colours == 0 else 1)
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise BadImage(f"not a PNG that can be read: {one_line(error) or type(error).__name__}") from error


# ---- boxes -------------------------------------------------------------------------------------------------------


def open_detected(spec: tuple[str, ...], *, key: str, classes: list[str] | None) -> Detected:
    """A folder with `annotations.json` and `images/`, or [an annotation file, the folder of its images].

    classes: those of the training data, which validation must share; None: the categories, by ascending id.
    UserError with the file and the place in it for what does not fit together.
    """
    if len(spec) == 2 and os.path.isfile(spec[0]) and os.path.isdir(spec[1]):
        path, root = spec
    else:
        folder = _one_folder(spec, key, "annotations.json and images/, or [annotations.json, folder of its images]")
        path, root = os.path.join(folder, "annotations.json"), os.path.join(folder, "images")
    try:
        with open_regular(path) as annotations:
            values = json.loads(annotations.read(), object_pairs_hook=_each_key_once)
    except BadImage as error:
        raise UserError(f"{key}: {path}: {error}") from error
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path}: cannot be read as JSON: {str(error).split(';')[0]}") from error
    lists: dict[str, list[dict[str, Any]]] = {}
    for part in ("images", "annotations", "categories"):
        entries = values.get(part) if isinstance(values, dict) else None
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            lists[part] = entries
        else:
            raise UserError(f"{key}: {path}: wants lists of objects named images, annotations and categories")

    def of(part: str, i: int, name: str, kinds: tuple[type, ...], words: str) -> Any:
        value = lists[part][i].get(name)
        if int in kinds and isinstance(value, float) and value.is_integer():  # as some tools write whole numbers
            value = int(value)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{key}: {path}: {part}[{i}].{name}: wants {words}; got {json.dumps(value)}")
        return value

    named: dict[int, str] = {}
    for i in range(len(lists["categories"])):
        number = of("categories", i, "id", (int,), "a number")
        if number in named:
            raise UserError(f"{key}: {path}: categories[{i}].id: {number} a second time")
        name = class_name(of("categories", i, "name", (str,), "a name"), f"{key}: {path}: categories[{i}].name")
        if name in named.values():
            raise UserError(f"{key}: {path}: categories[{i}].name: '{name}' a second time; names must differ")
        named[number] = name
    known = classes or [named[number] for number in sorted(named)]
    if not known:
        raise UserError(f"{key}: {path}: categories: at least one is needed")
    for name in named.values():
        if name not in known:
            raise UserError(f"{key}: {path}: categories: '{name}' is none of the {len(known)} of the training data")
    class_of = {number: known.index(name) for number, name in named.items()}

    numbers: dict[int, int] = {}
    images, sizes, listed = [], list[tuple[int, int] | None](), set[str]()
    for i in range(len(lists["images"])):
        number = of("images", i, "id", (int,), "a number")
        if number in numbers:
            raise UserError(f"{key}: {path}: images[{i}].id: {number} a second time")
        numbers[number] = i
        file = os.path.join(root, of("images", i, "file_name", (str,), "a file name"))
        if not os.path.isfile(file):
            what = "not a file" if os.path.exists(file) else "no such file"
            raise UserError(f"{key}: {path}: images[{i}].file_name: {what}: {file}")
        if file in listed:
            raise UserError(f"{key}: {path}: images[{i}].file_name: {file} a second time")
        listed.add(file)
        images.append(file)
        entry = lists["images"][i]
        stated = "width" in entry or "height" in entry
        width, height = (of("images", i, side, (int,), "pixels") if stated else 0 for side in ("width", "height"))
        if stated and not (1 <= width <= MOST_SIDE_PX and 1 <= height <= MOST_SIDE_PX):
            raise UserError(f"{key}: {path}: images[{i}]: width, height: must be from 1 to {MOST_SIDE_PX} pixels")
        sizes.append((width, height) if stated else _size_of(file))
    if not images:
        raise UserError(f"{key}: {path}: no images in it")
    boxes: list[list[list[float]]] = [[] for _ in images]
    labels: list[list[list[int]]] = [[] for _ in images]
    left_out, cut, relative = LeftOut(), list[str](), True
    for i, entry in enumerate(lists["annotations"]):
        for name, allowed in (("image_id", numbers), ("category_id", class_of)):
            if of("annotations", i, name, (int,), "a number") not in allowed:
                raise UserError(f"{key}: {path}: annotations[{i}].{name}: there is no {name[:-3]} {entry[name]}")
        box = entry.get("bbox")
        numeric = isinstance(box, list) and len(box) == 4 and all(_is_number(v) for v in box)
        if not isinstance(box, list) or not numeric or box[2] < 0 or box[3] < 0:
            got = json.dumps(box)
            raise UserError(
                f"{key}: {path}: annotations[{i}].bbox: wants x, y, width, height, no size negative; got {got}"
            )
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1) or isinstance(crowd, float):
            raise UserError(f"{key}: {path}: annotations[{i}].iscrowd: wants 0 or 1; got {json.dumps(crowd)}")
        x, y, w, h = map(float, box)
        area = entry.get("area")
        if area is not None and not (_is_number(area) and area >= 0):
            raise UserError(
                f"{key}: {path}: annotations[{i}].area: must be a number of pixels; got {json.dumps(area)}. Without it "
                "the area is that of the box"
            )
        area = w * h if area is None else float(area)
        where = f"{path}: annotations[{i}].bbox"
        place = numbers[int(entry["image_id"])]
        width, height = sizes[place] or (math.inf, math.inf)
        corners = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
        if corners[0] >= corners[2] or corners[1] >= corners[3]:  # COCO has a few without height
            left_out.add("no pixel of its image", f"{where}: {json.dumps(box)}")
            continue
        relative = relative and x + w <= 1 and y + h <= 1
        if max(-x, -y, x + w - width, y + h - height) > MOST_OUTSIDE_PX:
            cut.append(f"{where}: {json.dumps(box)}")
        boxes[place].append([*corners, area])
        labels[place].append([class_of[int(entry["category_id"])], int(crowd)])
    if not any(1 - crowd for of_image in labels for _, crowd in of_image):
        raise UserError(f"{key}: {path}: annotations: not one box" + (f"; {left_out}" if left_out else ""))
    if relative:
        raise UserError(
            f"{key}: {path}: annotations: every box ends within 1 px; boxes are in pixels, not in parts of 1"
        )
    return Detected(
        images,
        known,
        sizes,
        [np.array(b, dtype=np.float32).reshape(-1, 5) for b in boxes],
        [np.array(b, dtype=np.int64).reshape(-1, 2) for b in labels],
        cut,
        left_out=left_out,
    )


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError for an object of JSON that has a key twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


def _is_number(value: Any) -> bool:
    """JSON's integers have no end, and its reader takes NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


# ---- batches -----------------------------------------------------------------------------------------------------


class DenseDataset(Dataset[LabeledBatch]):
    """Random resized crops of a subset with their labels; keys are (position, 0, place in the subset).

    All of it is a pure function of (seed, position). A bad image is replaced by the next of the subset.
    """

    def __init__(
        self,
        data: Segmented | Detected,
        subset: np.ndarray,
        seed: int,
        *,
        size: tuple[int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
        color_jitter: float | None,
        **decoding: Any,
    ) -> None:
        """size: (H, W) px; scale, ratio: ranges of a crop's area and aspect. decoding: as `decode_crop` wants it."""
        self.data, self.subset, self.seed, self.decoding = data, subset, seed, decoding
        self.size, self.scale, self.ratio, self.flip, self.color_jitter = size, scale, ratio, flip, color_jitter

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> LabeledBatch | UserError:
        try:
            samples = [self._sample(position, place) for position, _, place in keys]
        except UserError as error:
            return error
        images, labels, passed_over = zip(*samples, strict=True)
        bad = [line for lines in passed_over for line in lines]
        readable = torch.ones(len(keys), dtype=torch.bool)
        positions = torch.tensor([k[0] for k in keys])
        replaced = sum(map(bool, passed_over))
        return LabeledBatch(torch.stack(images), _together(labels), positions, readable, bad, replaced)

    def _sample(self, position: int, place: int) -> tuple[Tensor, Any, list[str]]:
        """The image, its labels, and a line for each unreadable one in whose place it stands."""
        bad: list[str] = []
        for step in range(len(self.subset)):
            number = int(self.subset[(place + step) % len(self.subset)])
            rng = stream(self.seed, Purpose.AUGMENT, position)
            flip = rng.random() < self.flip  # drawn first: the crop takes a varying number of draws
            chosen: list[Box] = []

            def box(
                width: int,
                height: int,
                number: int = number,
                rng: np.random.Generator = rng,
                chosen: list[Box] = chosen,
            ) -> Box:
                self.data.check(number, width, height)
                chosen.append(random_box(rng, width, height, self.scale, self.ratio))
                return chosen[-1]

            try:
                image = decode_crop(read_regular(self.data.images[number]), box, self.size, **self.decoding)
                labels = self.data.cropped(number, chosen[-1], self.size, flip)
            except BadImage as error:
                bad.append(f"{self.data.images[number]}: {error}")
                continue
            if self.color_jitter:
                image = _jittered(image, rng, self.color_jitter)
            return (image.flip(-1) if flip else image), labels, bad
        raise UserError("data.train: not one of the chosen images can be read; the last: " + bad[-1])


class WholeDataset(Dataset[LabeledBatch]):
    """Whole images with their labels for evaluation; keys are numbers of images. Unreadable ones are left out.

    fit: image size (h, w) -> the size it is scaled to. size: (H, W) of the canvas in whose upper left the image is put,
    over grey; None: no canvas, and a list of images.
    """

    def __init__(
        self,
        data: Segmented | Detected,
        fit: Callable[[int, int], tuple[int, int]],
        size: tuple[int, int] | None,
        **decoding: Any,
    ) -> None:
        self.data, self.fit, self.size, self.decoding = data, fit, size, decoding

    def __getitems__(self, keys: list[int]) -> LabeledBatch | UserError:
        images, labels = list[Tensor](), []
        readable, bad = torch.ones(len(keys), dtype=torch.bool), []
        for i, number in enumerate(keys):
            name = self.data.images[number]
            try:
                image = whole_image(read_regular(name), **self.decoding)
                h, w = int(image.shape[1]), int(image.shape[2])
                self.data.check(number, w, h)
                scaled = scaled_to(image, within(self.fit(h, w), self.decoding["max_image_pixels"]))
                labels.append(self.data.whole(number, scaled.shape[2] / w, (h, w)))
            except BadImage as error:
                readable[i] = False
                bad.append(f"{name}: {error}")
                continue
            images.append(scaled if self.size is None else on_canvas(scaled, self.size))
        together: Any = images if self.size is None or not images else torch.stack(images)
        return LabeledBatch(together, labels, torch.tensor(keys), readable, bad)


def whole_image(data: bytes, **decoding: Any) -> Tensor:
    """(C, h, w) uint8. BadImage."""
    pixels = decode_pillow(data, **decoding)
    return torch.from_numpy(np.atleast_3d(np.array(pixels))).permute(2, 0, 1)


def scaled_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image if tuple(image.shape[1:]) == size else F.resize(image, list(size), InterpolationMode.BICUBIC)


def on_canvas(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The image in the upper left of a grey one of (H, W)."""
    canvas = torch.full((image.shape[0], *size), GREY, dtype=torch.uint8)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def fit_shorter_side(side_px: int, window: tuple[int, int]) -> Callable[[int, int], tuple[int, int]]:
    """Sizes with this shorter side, and no smaller than the window (H, W)."""

    def fit(h: int, w: int) -> tuple[int, int]:
        scale = max(side_px / min(h, w), window[0] / h, window[1] / w)
        return max(round(h * scale), window[0]), max(round(w * scale), window[1])

    return fit


def fit_inside(size: tuple[int, int]) -> Callable[[int, int], tuple[int, int]]:
    """The largest size of the same aspect within (H, W)."""

    def fit(h: int, w: int) -> tuple[int, int]:
        scale = min(size[0] / h, size[1] / w)
        return max(round(h * scale), 1), max(round(w * scale), 1)

    return fit


def within(size: tuple[int, int], max_image_pixels: int) -> tuple[int, int]:
    """BadImage where an image would be too large once it is scaled: a thin one grows with its shorter side."""
    if size[0] * size[1] > max_image_pixels:
        raise BadImage(f"{size[1]}×{size[0]} pixels once it is scaled, over max_image_pixels {max_image_pixels}")
    return size


def _together(labels: Sequence[Any]) -> Any:
    return torch.stack(list(labels)) if isinstance(labels[0], Tensor) else list(labels)


def _jittered(image: Tensor, rng: np.random.Generator, strength: float) -> Tensor:
    """Brightness, contrast and, in colour, saturation, each times a factor of 1 ± strength, in this order."""
    changes = [F.adjust_brightness, F.adjust_contrast, *([F.adjust_saturation] if image.shape[0] >= 3 else [])]
    seen, rest = image[:3], image[3:]  # transparency is no colour
    for change in changes:
        seen = change(seen, rng.uniform(max(1 - strength, 0), 1 + strength))
    return torch.cat([seen, rest])
