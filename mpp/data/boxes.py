"""Open images with boxes, from a COCO file."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np

from mpp.data.class_labels import class_name
from mpp.data.files import open_regular
from mpp.data.masks import one_folder
from mpp.data.places import MOST_OUTSIDE_PX, MOST_SIDE_PX, Detected, size_of
from mpp.data.walk import LeftOut
from mpp.errors import BadImage, UserError
from mpp.recipe.flat import JsonObject


def open_detected(spec: tuple[str, ...], *, key: str, classes: list[str] | None) -> Detected:
    """A folder with `annotations.json` and `images/`, or [an annotation file, the folder of its images].

    classes: those of the training data, which validation must share; None: the categories, by ascending id.
    UserError with the file and the place in it for what does not fit together.
    """
    if len(spec) == 2 and os.path.isfile(spec[0]) and os.path.isdir(spec[1]):
        path, root = spec
    else:
        folder = one_folder(spec, key, "annotations.json and images/, or [annotations.json, folder of its images]")
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
    lists: dict[str, list[JsonObject]] = {}
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
        sizes.append((width, height) if stated else size_of(file))
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


def _each_key_once(pairs: list[tuple[str, object]]) -> JsonObject:
    """ValueError for an object of JSON that has a key twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


def _is_number(value: object) -> bool:
    """JSON's integers have no end, and its reader takes NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
