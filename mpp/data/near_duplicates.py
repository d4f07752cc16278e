"""Find pairs of images that show the same picture: encoded again, resized, slightly cropped, brighter or darker."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpp.data.centre_crops import CentreCrops, Crops
from mpp.data.loader import batches
from mpp.data.readers import AllImages
from mpp.drawing.sheets import save_png, scaled, sheet
from mpp.errors import MppWarning, UserError, without_secrets
from mpp.recipe.sections import Decoding
from mpp.recipe.values import ALL_FORMATS
from mpp.runs.loop_progress import LoopProgress

DECODING: Decoding = {
    "channels": 3,
    "formats": ALL_FORMATS,
    "max_image_pixels": 64_000_000,
}
SIDE_PX = 64
"""Side of the images that are described."""
GRID = 8
"""Side of the grid of mean colours that a descriptor is made of."""
LEAST_CONTRAST = 2.0
"""Images whose grid deviates less from its mean, as a root mean square in levels of 0 to 255, are alike to none: a
single level would decide (a guess)."""
BATCH = 256
LIMIT = 0.87
"""Similarity from which two images count as near duplicates.

Of 400 altered copies among 3,000 photographs of 64 px, all but one were above it, and no other pair
(recipes/LOG.md)."""
MOST_PAIRS = 1_000_000
"""Most pairs that are kept, the most similar ones."""
BLOCK = 2048
"""Images whose similarities to as many others are in memory at once."""
ROUNDING = 1e-5
"""Equal descriptors have a similarity of 1 up to this."""
MOST_SHOWN = 12
"""Pairs on a picture."""


class Pair(NamedTuple):
    """Two images and the similarity of their descriptors, at most 1."""

    similarity: float
    image: str
    other: str


@dataclass(frozen=True)
class NearDuplicates:
    """The pairs that were found."""

    pairs: list[Pair]
    """The most similar first."""
    images: int
    """Number of images that were compared."""
    others: int | None
    """Number of images they were compared with; None if they were compared with each other."""
    unreadable: list[str]
    """A line for each image that cannot be read."""


class Described(NamedTuple):
    """Images with their descriptors."""

    images: AllImages
    descriptors: Tensor
    """(images, 3 · GRID²); zeros for images that cannot be read."""
    unreadable: list[str]


class WholeImages(CentreCrops):
    """Whole images, stretched to a square, so that copies of another aspect are also found."""

    def __init__(self, images: AllImages) -> None:
        super().__init__(images, (SIDE_PX, SIDE_PX), 1.0, **DECODING)
        self.boxes = [lambda width, height: (0, 0, width, height)]


def near_duplicates(
    places: Sequence[str],
    against: Sequence[str] | None = None,
    *,
    out: Path | None = None,
    similarity: float = LIMIT,
    picture: Path | None = None,
    workers: int = 0,
) -> NearDuplicates:
    """Find near duplicates among images, or between them and other images.

    Every image is compared with every other one, so the time grows with the square of their number.

    Args:
        places: Shards, image files or folders of images.
        against: Places of other images, with which those of `places` are compared. None: with each other.
        out: CSV file for the pairs. None means that none is written.
        similarity: Least similarity of a pair.
        picture: PNG for the least similar pairs, at which the limit can be judged. None means that none is drawn.
        workers: Number of processes that read images. 0 means that this process reads.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    if not 0 < similarity <= 1:
        raise UserError(f"--similarity: {similarity}: must be above 0 and at most 1")
    if workers < 0:
        raise UserError(f"--workers: {workers}: must be at least 0")
    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"--picture: {picture}: must end with .png")
    for option, path in (("--out", out), ("--picture", picture)):
        _check_writable(option, path)
    images = describe_all(AllImages(places, "IMAGES"), workers)
    others = images if against is None else describe_all(AllImages(against, "--against"), workers)
    found = [
        (score, i, j)
        for score, i, j in find_pairs(images.descriptors, None if against is None else others.descriptors, similarity)
        if not _same_file(images.images.name(i), others.images.name(j))
    ]
    pairs = [Pair(round(score, 4), _name(images, i), _name(others, j)) for score, i, j in found]
    if out is not None:
        with open(out, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([("similarity", "image", "other"), *pairs])
    if picture is not None:
        picture.unlink(missing_ok=True)
        if found:
            save_png(_draw(found[-MOST_SHOWN:], images, others), picture)
    return NearDuplicates(
        pairs,
        len(images.images),
        None if against is None else len(others.images),
        images.unreadable + (others.unreadable if against is not None else []),
    )


def describe_all(images: AllImages, workers: int) -> Described:
    """Describe all images.

    Raises:
        UserError: If none of them can be read.
    """
    keys = [list(range(i, min(i + BATCH, len(images)))) for i in range(0, len(images), BATCH)]
    descriptors, unreadable = torch.zeros(len(images), 3 * GRID**2), list[str]()
    batch: Crops
    loaded = batches(WholeImages(images), keys, workers=workers, pin_memory=False)
    for numbers, batch in zip(keys, LoopProgress().shown(loaded, "batch", len(keys)), strict=True):
        descriptors[numbers] = describe(batch.images) * batch.readable[:, None]
        unreadable += map(without_secrets, batch.bad)
    if len(unreadable) == len(images):
        raise UserError(f"not one of {len(images)} images can be read; the first: {unreadable[0]}")
    return Described(images, descriptors, unreadable)


def describe(images: Tensor) -> Tensor:
    """Describe images by a weighted cosine transform of a grid of mean colours.

    Perceptual hashes use such a transform, too (Zauner 2010, section 3.2.1). Natural
    images have about equal power in each octave (Field 1987), so each cosine is multiplied by its frequency: otherwise
    the coarsest, which many images share, would decide. Mean brightness and contrast drop out.

    Args:
        images: (B, 3, H, W) uint8. H and W are multiples of GRID.

    Returns:
        (B, 3 · GRID²) of length 1; zeros for images with too little contrast.
    """
    grid = torch.nn.functional.adaptive_avg_pool2d(images.float(), GRID)
    waves = torch.einsum("ky,cd,bdyx,lx->bckl", COSINES, BRIGHTNESS_AND_COLOUR, grid, COSINES)
    waves[:, :, 0, 0] = 0
    visible = waves.flatten(1).norm(dim=1, keepdim=True) >= GRID * LEAST_CONTRAST
    return torch.nn.functional.normalize((waves * FREQUENCY).flatten(1), dim=1) * visible


def find_pairs(described: Tensor, among: Tensor | None, similarity: float) -> list[tuple[float, int, int]]:
    """Return (similarity, number, other number) of all pairs that are similar enough, the most similar first.

    If there are more than MOST_PAIRS, only the most similar are returned, and a warning is given.

    Args:
        described: (n, D) descriptors.
        among: (m, D) descriptors of the other images. None: pairs of two different images of `described`.
        similarity: Least similarity of a pair.
    """
    others = described if among is None else among
    scores, rows, columns = torch.zeros(0), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    too_many = False
    for first in range(0, len(described), BLOCK):
        for start in range(first if among is None else 0, len(others), BLOCK):
            alike = described[first : first + BLOCK] @ others[start : start + BLOCK].T
            enough = alike >= similarity - ROUNDING
            if among is None and start == first:
                enough = enough.triu(1)
            i, j = enough.nonzero(as_tuple=True)
            scores = torch.cat([scores, alike[i, j].clamp(max=1)])
            rows, columns = torch.cat([rows, (first + i).int()]), torch.cat([columns, (start + j).int()])
            if len(scores) > MOST_PAIRS:
                too_many = True
                scores, best = scores.sort(descending=True, stable=True)
                scores, rows, columns = scores[:MOST_PAIRS], rows[best][:MOST_PAIRS], columns[best][:MOST_PAIRS]
    if too_many:
        text = f"more than {MOST_PAIRS:,} pairs; the most similar are kept. Is one image there many times?"
        warnings.warn(text, MppWarning, stacklevel=3)
    scores, order = scores.sort(descending=True, stable=True)
    return list(zip(scores.tolist(), rows[order].tolist(), columns[order].tolist(), strict=True))


def _cosines() -> Tensor:
    """Return the orthonormal basis of the discrete cosine transform, (GRID frequencies, GRID places)."""
    frequency, place = torch.arange(GRID).float()[:, None], torch.arange(GRID).float()[None]
    basis = torch.cos(math.pi * frequency * (place + 0.5) / GRID) * math.sqrt(2 / GRID)
    basis[0] /= math.sqrt(2)
    return basis


COSINES = _cosines()
FREQUENCY = torch.cdist(torch.zeros(1, 2), torch.cartesian_prod(*[torch.arange(GRID).float()] * 2)).view(GRID, GRID)
"""(GRID, GRID): frequency of each wave, 0 for the mean."""
BRIGHTNESS_AND_COLOUR = torch.tensor([[0.299, 0.587, 0.114], [-0.338, -0.662, 1.0], [1.0, -0.838, -0.162]])
"""Matrix from RGB to brightness and two differences of colours (those of JPEG, twice as strong)."""


def _check_writable(option: str, path: Path | None) -> None:
    """Check that a file can be written, before any work.

    Raises:
        UserError: If it cannot.
    """
    if path is None:
        return
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option}: {path}: cannot be written; give a file in a folder that exists")


def _same_file(name: str, other: str) -> bool:
    """Return whether two names are of one file, which may have been given twice."""
    return name == other or (os.path.exists(name) and os.path.realpath(name) == os.path.realpath(other))


def _name(described: Described, number: int) -> str:
    return without_secrets(described.images.name(number))


def _draw(pairs: Sequence[tuple[float, int, int]], images: Described, others: Described) -> Image.Image:
    """Draw pairs of images, one above the other, with their similarity."""
    rows = []
    for described, numbers in ((images, [i for _, i, _ in pairs]), (others, [j for *_, j in pairs])):
        crops = WholeImages(described.images).__getitems__(numbers)
        if isinstance(crops, UserError):
            raise crops
        rows.append([scaled(Image.fromarray(np.ascontiguousarray(c.permute(1, 2, 0).numpy()))) for c in crops.images])
    return sheet(rows, [f"{similarity:.4f}" for similarity, *_ in pairs])
