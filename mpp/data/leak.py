"""Check whether validation images are, byte for byte, among the training images."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpp.data.decoding.decode import decode_pillow
from mpp.data.readers import Reader
from mpp.data.shards.reader import evenly
from mpp.errors import BadImage
from mpp.recipe.flat import JsonObject
from mpp.recipe.values import ALL_FORMATS

MOST_CHECKED = 2000
"""Greatest number of validation images that are searched for, evenly spread."""
MOST_READ, MOST_BYTES = 100_000, 1_000_000_000
"""Greatest number and total bytes of training images that are read because of their sizes, evenly spread. If there are
more, the count of shared images is a lower bound."""
MOST_NAMED = 5
MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class Leak:
    """Result of a search for validation images among training images."""

    shared: int
    """Number of the checked images whose exact bytes are in the training set."""
    checked: int
    examples: list[tuple[str, str]]
    """(name in validation, name in training) of at most MOST_NAMED shared images."""

    def to_json(self) -> JsonObject:
        return asdict(self)


def leak(val: Reader, train: Reader) -> Leak:
    """Search for validation images among training images.

    File sizes are compared first, then checksums of the images with common sizes. The same picture encoded again is not
    found. Images of a single colour do not count, because unrelated ones are equal.
    """
    val_sizes, theirs = val.sizes(), train.sizes()
    there = np.flatnonzero(val_sizes > 0)
    chosen = there[evenly(len(there), MOST_CHECKED)]
    alike = np.flatnonzero(np.isin(theirs, val_sizes[chosen]))
    most = min(MOST_READ, int(MOST_BYTES / max(theirs[alike].mean(), 1))) if len(alike) else 0
    if len(alike) > most:  # most likely all files have one size: a part of them is enough
        alike = alike[evenly(len(alike), max(most, 1))]
    wanted: dict[bytes, list[int]] = {}
    for i in chosen.tolist():
        if (digest := _digest(val, i)) is not None:
            wanted.setdefault(digest, []).append(i)
    train_of_val: dict[int, int] = {}
    for j in alike.tolist():
        for i in wanted.get(_digest(train, j) or b"", ()):
            if not _of_one_colour(val.read(i)):
                train_of_val.setdefault(i, j)
    examples = [(val.name(i), train.name(j)) for i, j in sorted(train_of_val.items())[:MOST_NAMED]]
    return Leak(len(train_of_val), len(chosen), examples)


def find_shared(images: Reader, val: Reader) -> list[int]:
    """Return the numbers of all images whose exact bytes are among the validation images, ascending.

    File sizes are compared first, then checksums of the images with common sizes. If all files have one size, every
    file is read.
    """
    sizes, val_sizes = images.sizes(), val.sizes()
    alike = np.flatnonzero((sizes > 0) & np.isin(sizes, val_sizes))
    wanted = {_digest(val, int(i)) for i in np.flatnonzero(np.isin(val_sizes, sizes[alike]))} - {None}
    return [int(i) for i in alike if _digest(images, int(i)) in wanted]


def _digest(images: Reader, i: int) -> bytes | None:
    try:
        return hashlib.sha256(images.read(i)).digest()
    except BadImage:
        return None


def _of_one_colour(data: bytes) -> bool:
    try:
        image = decode_pillow(data, channels=3, formats=ALL_FORMATS, max_image_pixels=MOST_PIXELS)
    except BadImage:
        return False
    extrema: Any = image.getextrema()  # (low, high) of each of the three channels
    return all(low == high for low, high in extrema)
