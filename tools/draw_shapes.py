"""Draw discs, squares and triangles on textures, with masks and boxes: data for trying segmentation and detection.

    python tools/draw_shapes.py shapes        # unlabeled/ 4,000 images; train/ 100 and val/ 200 with labels

Shapes are warm and the ground is cold, so only the outline shows what a shape is. With colours from the whole cube, a
model learns the few labeled images by their colours, and no outlines. Image i of a part is a pure function of (part,
i).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square", "triangle")
GROUND, SHAPE, SPREAD = (70, 100, 150), (180, 140, 80), 50
FINER = 4  # outlines are drawn at this multiple of the size, then shrunk
PARTS = {"unlabeled": 0, "train": 1, "val": 2}


def texture(rng: np.random.Generator, colour: Sequence[float], side_px: int) -> np.ndarray:
    """Return a texture, (side, side, 3) float in [0, 255].

    Two colours near the given one are mixed by a few waves, and noise is added.
    """
    y, x = np.mgrid[:side_px, :side_px] / side_px
    waves = np.zeros((side_px, side_px))
    for _ in range(3):
        angle, cycles, phase = rng.uniform(0, math.pi), rng.uniform(1, 8), rng.uniform(0, 2 * math.pi)
        waves += np.sin(2 * math.pi * cycles * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    share = (waves / 6 + 0.5)[..., None]
    low, high = (colour + rng.uniform(-SPREAD, SPREAD, 3) for _ in range(2))
    return (share * low + (1 - share) * high + rng.normal(0, 5, (side_px, side_px, 1))).clip(0, 255)


def outline(rng: np.random.Generator, kind: int, side_px: int) -> np.ndarray:
    """Return how much of each pixel a shape covers, (side, side) float in [0, 1]."""
    radius = rng.uniform(0.13, 0.27) * side_px
    cx, cy = rng.uniform(radius, side_px - radius, 2)
    canvas = Image.new("L", (side_px * FINER, side_px * FINER))
    draw = ImageDraw.Draw(canvas)
    turn = rng.uniform(0, 2 * math.pi)
    if CLASSES[kind] == "disc":
        draw.ellipse([FINER * v for v in (cx - radius, cy - radius, cx + radius, cy + radius)], fill=255)
    else:
        corners = {"square": 4, "triangle": 3}[CLASSES[kind]]
        angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
        draw.polygon(
            [(FINER * (cx + radius * math.cos(a)), FINER * (cy + radius * math.sin(a))) for a in angles], fill=255
        )
    return np.asarray(canvas.resize((side_px, side_px), Image.Resampling.BOX), dtype=np.float64) / 255


def drawn(part: str, number: int, side_px: int = 64) -> tuple[Image.Image, np.ndarray, list[tuple[int, np.ndarray]]]:
    """Return an image, its mask (side, side) uint8 with 0 for the background, and (class, visible pixels) of each
    shape.
    """
    rng = np.random.default_rng([PARTS[part], number])
    pixels, mask = texture(rng, GROUND, side_px), np.zeros((side_px, side_px), dtype=np.uint8)
    owner = np.full((side_px, side_px), -1)
    kinds = rng.integers(0, len(CLASSES), rng.integers(1, 4))
    whole = []
    for i, kind in enumerate(kinds):
        cover = outline(rng, int(kind), side_px)
        pixels = pixels * (1 - cover[..., None]) + texture(rng, SHAPE, side_px) * cover[..., None]
        mask[cover > 0.5], owner[cover > 0.5] = kind + 1, i
        whole.append(int((cover > 0.5).sum()))
    # a shape that later ones hide for the most part is no object
    shapes = [(int(k), owner == i) for i, k in enumerate(kinds) if (owner == i).sum() > whole[i] / 3]
    return Image.fromarray(pixels.round().astype(np.uint8)), mask, shapes


def make_folders(out: Path, part: str) -> tuple[Path, Path | None]:
    """Make out/part, and return the folders of its images and of its masks. "unlabeled" has no masks."""
    folder = out / part
    labeled = part != "unlabeled"
    images, masks = (folder / "images", folder / "masks") if labeled else (folder, None)
    for made in filter(None, (images, masks)):
        made.mkdir(parents=True, exist_ok=True)
    return images, masks


def write(out: Path, part: str, images: int, side_px: int = 64) -> None:
    """Write images to out/part. Except for "unlabeled", also write masks, classes.txt and annotations.json."""
    folder, (of_images, of_masks) = out / part, make_folders(out, part)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(images):
        image, mask, shapes = drawn(part, i, side_px)
        name = f"{i:05d}.png"
        image.save(of_images / name)
        if of_masks is None:
            continue
        Image.fromarray(mask).save(of_masks / name)
        entries.append({"id": i, "file_name": name, "width": side_px, "height": side_px})
        for kind, where in shapes:
            ys, xs = np.nonzero(where)
            x, y = int(xs.min()), int(ys.min())
            box = [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y]
            annotations.append(
                {
                    "id": len(annotations), "image_id": i, "category_id": kind + 1, "bbox": box,
                    "area": int(where.sum()), "iscrowd": 0,
                }
            )  # fmt: skip
    if of_masks:
        (folder / "classes.txt").write_text("background\n" + "\n".join(CLASSES) + "\n")
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
        coco = {"images": entries, "annotations": annotations, "categories": categories}
        (folder / "annotations.json").write_text(json.dumps(coco))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Discs, squares and triangles on textures, with masks and boxes.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--unlabeled", type=int, default=4000)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--side-px", type=int, default=64)
    given = parser.parse_args(words)
    for part in PARTS:
        write(given.out, part, getattr(given, part), given.side_px)
    print(f"{given.out}: " + ", ".join(f"{getattr(given, part)} {part}" for part in PARTS))


if __name__ == "__main__":
    main()
