"""Find pairs of images that show the same picture: encoded again, resized, slightly cropped, brighter or darker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mpp.data.centre_crops import CentreCrops, Crops
from mpp.data.loader import batches
from mpp.data.readers import AllImages
from mpp.drawing.sheets import save_png, scaled, sheet
from mpp.errors import UserError, without_secrets
from mpp.recipe.sections import Decoding

DECODING: Decoding = {
    "channels": 3,
    "formats": ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"),
    "max_image_pixels": 64_000_000,
}
SIDE_PX = 64
"""Side of the images that are described."""
GRID = 8
"""Side of the grid of mean colours that a descriptor is made of."""
BATCH = 256
LIMIT = 0.87
"""Similarity from which two images count as near duplicates.

Of 400 altered copies among 3,000 photographs of 64 px, all but one were above it, and no other pair
(recipes/LOG.md)."""
MOST_PAIRS = 1_000_000
BLOCK = 2048
"""Images whose similarities to all others are in memory at once."""
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


def near_duplicates(
    places: Sequence[str],
    against: Sequence[str] = (),
    *,
    similarity: float = LIMIT,
    picture: Path | None = None,
    workers: int = 0,
) -> NearDuplicates:
    """Find near duplicates among images, or between them and other images.

    Every image is compared with every other one, so the time grows with the square of their number.

    Args:
        places: Shards, image files or folders of images.
        against: Places of other images. If there are some, the images of `places` are compared with these only.
        similarity: Least similarity of a pair.
        picture: PNG to write, with the least similar pairs, at which the limit can be judged. None means none.
        workers: Number of processes that read images. 0 means that this process reads.

    Raises:
        UserError: If there are no images, or a million pairs.
    """
    if not 0 < similarity <= 1:
        raise UserError(f"--similarity: {similarity}: must be above 0 and at most 1")
    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"--picture: {picture}: must end with .png")
    images = AllImages(places, "IMAGES")
    others = AllImages(against, "--against") if against else None
    described, unreadable = describe_all(images, workers)
    among, more = describe_all(others, workers) if others else (None, [])
    found = find_pairs(described, among, similarity)
    theirs = others or images
    pairs = [Pair(round(s, 4), _name(images, i), _name(theirs, j)) for s, i, j in found]
    if picture is not None and found:
        save_png(_draw(found[-MOST_SHOWN:], images, theirs), picture)
    return NearDuplicates(pairs, len(images), len(others) if others else None, unreadable + more)


def describe_all(images: AllImages, workers: int) -> tuple[Tensor, list[str]]:
    """Return the descriptors of all images, (n, 3 · GRID²), and a line for each image that cannot be read."""
    crops = CentreCrops(images, (SIDE_PX, SIDE_PX), 1.0, **DECODING)
    keys = [list(range(i, min(i + BATCH, len(images)))) for i in range(0, len(images), BATCH)]
    described, unreadable = list[Tensor](), list[str]()
    batch: Crops
    for batch in batches(crops, keys, workers=workers, pin_memory=False):
        described.append(describe(batch.images) * batch.readable[:, None])
        unreadable += map(without_secrets, batch.bad)
    return torch.cat(described), unreadable


def describe(images: Tensor) -> Tensor:
    """Describe images by the signs and strengths of their coarse waves of brightness and colour.

    A grid of mean colours is decomposed into cosines (as perceptual hashes do; Zauner 2010, section 3.2.1). Natural
    images have about equal power in each octave (Field 1987), so each cosine is multiplied by its frequency: otherwise
    the coarsest, which many images share, would decide. Mean brightness and contrast drop out.

    Args:
        images: (B, 3, H, W) uint8. H and W are multiples of GRID.

    Returns:
        (B, 3 · GRID²) of length 1; zeros for images of a single colour.
    """
    grid = torch.nn.functional.adaptive_avg_pool2d(images.float(), GRID)
    waves = torch.einsum("ky,cd,bdyx,lx->bckl", COSINES, BRIGHTNESS_AND_COLOUR, grid, COSINES)
    described = (waves * FREQUENCY).flatten(1)
    length = described.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-3 * GRID, described / length.clamp(min=1e-9), 0.0)


def find_pairs(described: Tensor, among: Tensor | None, similarity: float) -> list[tuple[float, int, int]]:
    """Return (similarity, number, other number) of all pairs that are similar enough, the most similar first.

    Args:
        described: (n, D) descriptors.
        among: (m, D) descriptors of the other images. None: pairs of two different images of `described`.
        similarity: Least similarity.

    Raises:
        UserError: If there are a million pairs or more.
    """
    found = list[tuple[float, int, int]]()
    others = described if among is None else among
    for first in range(0, len(described), BLOCK):
        rows = described[first : first + BLOCK]
        for start in range(first if among is None else 0, len(others), BLOCK):
            alike = rows @ others[start : start + BLOCK].T
            for i, j in (alike >= similarity).nonzero().tolist():
                if among is not None or first + i < start + j:
                    found.append((min(float(alike[i, j]), 1.0), first + i, start + j))
        if len(found) >= MOST_PAIRS:
            raise UserError(f"--similarity: {similarity}: {len(found):,} pairs so far; raise it")
    return sorted(found, key=lambda pair: (-pair[0], *pair[1:]))


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


def _name(images: AllImages, number: int) -> str:
    return without_secrets(images.name(number))


def _draw(pairs: Sequence[tuple[float, int, int]], images: AllImages, others: AllImages) -> Image.Image:
    """Draw pairs of images, one above the other, with their similarity."""
    rows = []
    for reader, numbers in ((images, [i for _, i, _ in pairs]), (others, [j for *_, j in pairs])):
        crops = CentreCrops(reader, (SIDE_PX, SIDE_PX), 1.0, **DECODING).__getitems__(numbers)
        if isinstance(crops, UserError):
            raise crops
        rows.append([scaled(Image.fromarray(crop.permute(1, 2, 0).numpy())) for crop in crops.images])
    return sheet(rows, [f"{similarity:.3f}" for similarity, *_ in pairs])
