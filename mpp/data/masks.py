"""Open images with segmentation masks."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mpp.data.class_labels import class_name
from mpp.data.places import CLASSES, Segmented, read_mask, size_of
from mpp.data.walk import images_below
from mpp.errors import BadImage, UserError


def open_segmented(spec: tuple[str, ...], *, key: str, classes: list[str] | None, ignore_index: int) -> Segmented:
    """Open a folder with `images/` and `masks/`, in which `images/a/b.jpg` belongs to `masks/a/b.png`.

    All masks are read once.

    Args:
        spec: Tuple with one folder.
        key: Recipe key, for messages.
        classes: Classes of the training data, which validation must share. None means the lines of `classes.txt` next
            to the two folders, or else the numbers from 0 to the largest value in the masks.
        ignore_index: Value of pixels without a class.

    Raises:
        UserError: If images, masks and classes do not fit together. The message names the file.
    """
    root = one_folder(spec, key, "images/ and masks/")
    for part in ("images", "masks"):
        if not os.path.isdir(os.path.join(root, part)):
            raise UserError(f"{key}: {root}: no folder {part}/ in it; task: segment requires images/ and masks/")
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
        examined = list(pool.map(_examine, images, masks))
    faults = [fault for fault, _, _ in examined if fault]
    if faults:
        raise UserError(f"{key}: {faults[0]}" + (f" (and {len(faults) - 1} more)" if faults[1:] else ""))
    counts = np.stack([count for _, count, _ in examined])
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
    sizes = [size for _, _, size in examined]
    return Segmented(images, known, masks, counts[:, : len(known)], sizes, ignored, left_out=left_out)


def one_folder(spec: tuple[str, ...], key: str, what: str) -> str:
    if len(spec) != 1 or not os.path.isdir(spec[0]):
        raise UserError(f"{key}: {', '.join(spec)}: expected one folder with {what}")
    return spec[0]


def _by_stem(paths: list[str], root: str, key: str) -> dict[str, str]:
    """Return the files by their path below `root` without its ending. Raise UserError if two files share one."""
    path_of: dict[str, str] = {}
    for path in paths:
        stem = os.path.splitext(os.path.relpath(path, root))[0]
        if stem in path_of:
            raise UserError(f"{key}: {path_of[stem]} and {path}: have the same name; rename one of them")
        path_of[stem] = path
    return path_of


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
            raise UserError(f"{path}:{number}: {'no name' if not name else f'{name} is named twice'}; one class a line")
    if not names or len(names) > 255:
        raise UserError(f"{path}: expected 1 to 255 classes; got {len(names)}")
    return names


def _examine(image: str, mask: str) -> tuple[str | None, np.ndarray, tuple[int, int]]:
    """Examine an image and its mask.

    Returns:
        A fault or None, the number of pixels with each value from 0 to 255, and the (width, height) of the mask.
    """
    try:
        values = read_mask(mask)
    except BadImage as error:
        return f"{mask}: {error}", np.zeros(256, dtype=np.int64), (0, 0)
    fault = None
    size = size_of(image)
    if size is not None and values.shape != size[::-1]:
        fault = f"{mask}: {values.shape[1]}×{values.shape[0]} pixels, its image {size[0]}×{size[1]}"
    return fault, np.bincount(values.ravel(), minlength=256), (values.shape[1], values.shape[0])
