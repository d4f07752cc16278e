"""Open images with boxes, from a COCO file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from mpp.data.class_labels import class_name
from mpp.data.files import open_regular
from mpp.data.masks import one_folder
from mpp.data.places import MOST_OUTSIDE_PX, MOST_SIDE_PX, Detected, size_of
from mpp.data.walk import LeftOut
from mpp.errors import BadImage, UserError
from mpp.recipe.flat import JsonObject


def open_detected(spec: tuple[str, ...], *, key: str, classes: list[str] | None) -> Detected:
    """Open a folder with `annotations.json` and `images/`, or [an annotation file, the folder of its images].

    Args:
        spec: Places in the recipe.
        key: Recipe key, for messages.
        classes: Classes of the training data, which validation must share. None means the categories, by ascending id.

    Raises:
        UserError: If the annotations are invalid or do not match the images, with the file and the place in it.
    """
    if len(spec) == 2 and os.path.isfile(spec[0]) and os.path.isdir(spec[1]):
        path, root = spec
    else:
        folder = one_folder(spec, key, "annotations.json and images/, or [annotations.json, folder of its images]")
        path, root = os.path.join(folder, "annotations.json"), os.path.join(folder, "images")
    file = _CocoFile(f"{key}: {path}", _read_json(path, key))
    known, class_of = _categories(file, classes)
    images, sizes, place_of = _images(file, root)
    annotated = _boxes(file, path, sizes, place_of, class_of)
    return Detected(
        images,
        known,
        sizes,
        [np.array(b, dtype=np.float32).reshape(-1, 5) for b in annotated.boxes],
        [np.array(b, dtype=np.int64).reshape(-1, 2) for b in annotated.labels],
        annotated.cut,
        left_out=annotated.left_out,
    )


class _CocoFile:
    """The three lists of a COCO file. UserError is raised if a list is missing, or later if a value is invalid."""

    def __init__(self, place: str, values: object) -> None:
        self.place = place
        self.lists: dict[str, list[JsonObject]] = {}
        for part in ("images", "annotations", "categories"):
            entries = values.get(part) if isinstance(values, dict) else None
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise UserError(f"{place}: requires lists of objects named images, annotations and categories")
            self.lists[part] = entries

    def number(self, part: str, i: int, name: str, words: str = "a number") -> int:
        """Return a value that must be a whole number. Some tools write whole numbers as 3.0."""
        value = self.lists[part][i].get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(part, i, f".{name}: expected {words}; got {json.dumps(value)}")
        return value

    def text(self, part: str, i: int, name: str, words: str) -> str:
        value = self.lists[part][i].get(name)
        if not isinstance(value, str):
            self.refuse(part, i, f".{name}: expected {words}; got {json.dumps(value)}")
        return value

    def refuse(self, part: str, i: int, why: str) -> NoReturn:
        raise UserError(f"{self.place}: {part}[{i}]{why}")


def _read_json(path: str, key: str) -> object:
    """Parse a JSON file. Raise UserError if that fails."""
    try:
        with open_regular(path) as annotations:
            value: object = json.loads(annotations.read(), object_pairs_hook=_each_key_once)
            return value
    except BadImage as error:
        raise UserError(f"{key}: {path}: {error}") from error
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path}: cannot be read as JSON: {str(error).split(';')[0]}") from error


def _categories(file: _CocoFile, classes: list[str] | None) -> tuple[list[str], dict[int, int]]:
    """Return the names of the classes, and the class of each category id. Raise UserError for invalid categories."""
    named: dict[int, str] = {}
    for i in range(len(file.lists["categories"])):
        number = file.number("categories", i, "id")
        if number in named:
            file.refuse("categories", i, f".id: {number} is used twice")
        place = f"{file.place}: categories[{i}].name"
        name = class_name(file.text("categories", i, "name", "a name"), place)
        if name in named.values():
            raise UserError(f"{place}: '{name}' is used twice; names must differ")
        named[number] = name
    known = classes or [named[number] for number in sorted(named)]
    if not known:
        raise UserError(f"{file.place}: categories: at least one is needed")
    for name in named.values():
        if name not in known:
            raise UserError(f"{file.place}: categories: '{name}' is none of the {len(known)} of the training data")
    return known, {number: known.index(name) for number, name in named.items()}


def _images(file: _CocoFile, root: str) -> tuple[list[str], list[tuple[int, int] | None], dict[int, int]]:
    """Read the list of images.

    Returns:
        (files, their sizes (width, height) or None if unknown, position of each image id in both lists).

    Raises:
        UserError: If the list is invalid or an image is missing.
    """
    place_of: dict[int, int] = {}
    images: list[str] = []
    sizes: list[tuple[int, int] | None] = []
    listed: set[str] = set()
    for i, entry in enumerate(file.lists["images"]):
        number = file.number("images", i, "id")
        if number in place_of:
            file.refuse("images", i, f".id: {number} is used twice")
        place_of[number] = i
        image = os.path.join(root, file.text("images", i, "file_name", "a file name"))
        if not os.path.isfile(image):
            what = "not a file" if os.path.exists(image) else "no such file"
            file.refuse("images", i, f".file_name: {what}: {image}")
        if image in listed:
            file.refuse("images", i, f".file_name: {image} is named twice")
        listed.add(image)
        images.append(image)
        if "width" in entry or "height" in entry:
            width, height = (file.number("images", i, side, "pixels") for side in ("width", "height"))
            if not (1 <= width <= MOST_SIDE_PX and 1 <= height <= MOST_SIDE_PX):
                file.refuse("images", i, f": width, height: must be from 1 to {MOST_SIDE_PX} pixels")
            sizes.append((width, height))
        else:
            sizes.append(size_of(image))
    if not images:
        raise UserError(f"{file.place}: no images in it")
    return images, sizes, place_of


@dataclass
class _Boxes:
    """Boxes and labels of each image."""

    boxes: list[list[list[float]]]
    """[x0, y0, x1, y1, area] of each box of each image, in pixels."""
    labels: list[list[list[int]]]
    """[class, 1 for a crowd or 0] of each box of each image."""
    left_out: LeftOut = field(default_factory=LeftOut)
    cut: list[str] = field(default_factory=list)
    """A line for each box that extends beyond its image by more than MOST_OUTSIDE_PX."""


def _boxes(
    file: _CocoFile,
    path: str,
    sizes: list[tuple[int, int] | None],
    place_of: dict[int, int],
    class_of: dict[int, int],
) -> _Boxes:
    """Read the annotations. Raise UserError for invalid ones."""
    annotated = _Boxes([[] for _ in sizes], [[] for _ in sizes])
    relative = True
    for i, entry in enumerate(file.lists["annotations"]):
        for name, allowed in (("image_id", place_of), ("category_id", class_of)):
            if file.number("annotations", i, name) not in allowed:
                file.refuse("annotations", i, f".{name}: there is no {name[:-3]} {entry[name]}")
        x, y, w, h = _box(file, i, entry)
        crowd, area = _crowd(file, i, entry), _area(file, i, entry)
        place, where = place_of[int(entry["image_id"])], f"{path}: annotations[{i}].bbox"
        width, height = sizes[place] or (math.inf, math.inf)
        corners = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
        if corners[0] >= corners[2] or corners[1] >= corners[3]:  # COCO has a few boxes without height
            annotated.left_out.add("no pixel of its image", f"{where}: {json.dumps(entry['bbox'])}")
            continue
        relative = relative and x + w <= 1 and y + h <= 1
        if max(-x, -y, x + w - width, y + h - height) > MOST_OUTSIDE_PX:
            annotated.cut.append(f"{where}: {json.dumps(entry['bbox'])}")
        annotated.boxes[place].append([*corners, w * h if area is None else area])
        annotated.labels[place].append([class_of[int(entry["category_id"])], crowd])
    if not any(1 - crowd for of_image in annotated.labels for _, crowd in of_image):
        lost = f"; {annotated.left_out}" if annotated.left_out else ""
        raise UserError(f"{file.place}: annotations: not one box{lost}")
    if relative:
        raise UserError(
            f"{file.place}: annotations: every box ends within 1 px; boxes are in pixels, not in parts of 1"
        )
    return annotated


def _box(file: _CocoFile, i: int, entry: JsonObject) -> tuple[float, float, float, float]:
    """Return (x, y, width, height) of an annotation in pixels. Raise UserError for invalid values."""
    box: Any = entry.get("bbox")
    numeric = isinstance(box, list) and len(box) == 4 and all(_is_number(v) for v in box)
    if not numeric or box[2] < 0 or box[3] < 0:
        file.refuse("annotations", i, f".bbox: expected x, y, width, height, no size negative; got {json.dumps(box)}")
    return float(box[0]), float(box[1]), float(box[2]), float(box[3])


def _crowd(file: _CocoFile, i: int, entry: JsonObject) -> int:
    """Return 1 for a crowd, a box around many objects that no prediction has to find; else 0.

    Raise UserError for other values.
    """
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1) or isinstance(crowd, float):
        file.refuse("annotations", i, f".iscrowd: expected 0 or 1; got {json.dumps(crowd)}")
    return int(crowd)


def _area(file: _CocoFile, i: int, entry: JsonObject) -> float | None:
    """Return the stated area in pixels; None means the area of the box. Raise UserError for an invalid value."""
    area: Any = entry.get("area")
    if area is not None and not (_is_number(area) and area >= 0):
        why = f".area: must be a number of pixels; got {json.dumps(area)}. Without it the area is that of the box"
        file.refuse("annotations", i, why)
    return None if area is None else float(area)


def _each_key_once(pairs: list[tuple[str, object]]) -> JsonObject:
    """Build a JSON object. Raise ValueError if it has a key twice, because one value would be lost."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return entries


def _is_number(value: object) -> bool:
    """Check for a number below 1e9 in size. JSON's integers have no limit, and Python's reader accepts NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
