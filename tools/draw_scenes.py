"""Draw street scenes with textures, and the class of every pixel: data for trying segmentation of photographs.

    python tools/draw_scenes.py scenes        # unlabeled/ 2,000 images; train/ 50 and val/ 200 with masks

The sizes of the eight classes differ a lot: people and poles cover two pixels in a hundred each. Colours tell little.
Trees and grass are both green, houses and roads grey, and cars and people have any colour. Edges between classes are
ignored (255), as in PASCAL VOC. Image i of a part is a pure function of (part, i).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent))
from draw_shapes import FINER, PARTS, make_folders, texture

CLASSES = ("sky", "road", "grass", "house", "tree", "car", "person", "pole")
SKY, ROAD, GRASS, HOUSE, TREE, CAR, PERSON, POLE = range(len(CLASSES))
COLOURS = {
    SKY: (165, 180, 205), ROAD: (110, 108, 110), GRASS: (95, 125, 80), HOUSE: (135, 125, 115), TREE: (75, 105, 70),
    POLE: (105, 105, 105),
}  # fmt: skip
"""Colour near which the texture of a class is drawn. Cars and people have a random colour."""
IGNORED = 255
EDGE = (0.05, 0.95)
"""A pixel belongs to no class if a thing covers a share of it between these."""
Point = tuple[float, float]


class Scene:
    """What has been drawn so far, from far to near. Lengths are fractions of the height."""

    def __init__(self, rng: np.random.Generator, height_px: int, width_px: int) -> None:
        self.rng, self.height_px, self.width_px = rng, height_px, width_px
        self.pixels = np.zeros((height_px, width_px, 3))
        self.mask = np.full((height_px, width_px), IGNORED, dtype=np.uint8)

    def add(self, kind: int, *outlines: Sequence[Point], round_: bool = False, colour: Sequence[float] = ()) -> None:
        """Draw a thing over the scene.

        Args:
            kind: Class of the thing.
            *outlines: Polygons of (x, y), measured from the upper left corner. The thing covers all of them.
            round_: Whether each outline is two corners of the box of an ellipse.
            colour: Colour to use instead of that of the class.
        """
        scale = self.height_px * FINER
        canvas = Image.new("L", (self.width_px * FINER, self.height_px * FINER))
        draw = ImageDraw.Draw(canvas)
        for outline in outlines:
            points = [(scale * x, scale * y) for x, y in outline]
            if round_:
                draw.ellipse(points, fill=255)
            else:
                draw.polygon(points, fill=255)
        small = canvas.resize((self.width_px, self.height_px), Image.Resampling.BOX)
        cover = np.asarray(small, dtype=np.float64) / 255
        surface = texture(self.rng, colour or COLOURS[kind], max(self.height_px, self.width_px))
        surface = surface[: self.height_px, : self.width_px]
        self.pixels = self.pixels * (1 - cover[..., None]) + surface * cover[..., None]
        self.mask[(cover > EDGE[0]) & (self.mask != kind)] = IGNORED
        self.mask[cover >= EDGE[1]] = kind


def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    """Return the corners of a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def drawn(part: str, number: int, height_px: int = 96, width_px: int = 128) -> tuple[Image.Image, np.ndarray]:
    """Return an image, and its mask (H, W) uint8."""
    rng = np.random.default_rng([PARTS[part], number, 1])
    scene, wide = Scene(rng, height_px, width_px), width_px / height_px
    horizon = rng.uniform(0.35, 0.5)
    scene.add(SKY, box(0, 0, wide, 1))
    scene.add(GRASS, box(0, horizon, wide, 1))
    middle, at = rng.uniform(0.4, 0.6) * wide, rng.uniform(0.3, 0.7) * wide
    half = rng.uniform(0.3, 0.5) * wide
    scene.add(ROAD, [(at - 0.05, horizon), (at + 0.05, horizon), (middle + half, 1), (middle - half, 1)])
    for _ in range(rng.integers(1, 4)):
        add_house(scene, horizon, wide)
    for _ in range(rng.integers(1, 4)):
        add_tree(scene, horizon, wide)
    feet = np.sort(rng.uniform(horizon + 0.08, 0.95, rng.integers(3, 7)))  # from far to near
    for y in feet:
        add = (add_car, add_person, add_pole)[rng.integers(3)]
        add(scene, rng.uniform(0.05, 0.95) * wide, float(y), float((y - horizon) / (1 - horizon)))
    return Image.fromarray(scene.pixels.round().clip(0, 255).astype(np.uint8)), scene.mask


def add_house(scene: Scene, horizon: float, wide: float) -> None:
    """Add a wall with a roof and dark windows."""
    rng = scene.rng
    left, width, height = rng.uniform(-0.1, wide), rng.uniform(0.2, 0.5), rng.uniform(0.12, 0.35)
    bottom = horizon + rng.uniform(0, 0.06)
    wall, top = box(left, bottom - height, left + width, bottom), bottom - height
    scene.add(HOUSE, wall, [(left, top), (left + width / 2, top - rng.uniform(0.02, 0.12)), (left + width, top)])
    for x in np.arange(left + 0.03, left + width - 0.05, 0.09):
        window = box(x, top + 0.04, x + 0.045, top + 0.09)
        scene.add(HOUSE, window, colour=(75, 75, 85))


def add_tree(scene: Scene, horizon: float, wide: float) -> None:
    """Add a crown of five discs on a trunk."""
    rng = scene.rng
    x, bottom, size = rng.uniform(0, wide), horizon + rng.uniform(0.02, 0.15), rng.uniform(0.07, 0.15)
    scene.add(TREE, box(x - 0.015, bottom - 2 * size, x + 0.015, bottom), colour=(95, 80, 60))
    centres = [(x + rng.normal(0, size / 2), bottom - 2 * size + rng.normal(0, size / 3)) for _ in range(5)]
    scene.add(TREE, *([(cx - size, cy - size), (cx + size, cy + size)] for cx, cy in centres), round_=True)


def any_colour(scene: Scene) -> list[float]:
    return [float(v) for v in scene.rng.uniform(40, 215, 3)]


def add_car(scene: Scene, x: float, y: float, near: float) -> None:
    """Add a body, a cabin and two wheels.

    Args:
        scene: Scene to draw on.
        x: Centre of the car.
        y: Bottom of the wheels.
        near: 0 at the horizon, 1 at the viewer's feet.
    """
    long = 0.12 + 0.3 * near
    high, colour = long * 0.25, any_colour(scene)
    body = box(x - long / 2, y - high - long * 0.08, x + long / 2, y - long * 0.08)
    roof = y - 1.8 * high - long * 0.08
    cabin = [(x - long * 0.3, y - high), (x - long * 0.2, roof), (x + long * 0.2, roof), (x + long * 0.3, y - high)]
    scene.add(CAR, body, cabin, colour=colour)
    radius = long * 0.1
    wheels = ([(at - radius, y - 2 * radius), (at + radius, y)] for at in (x - long * 0.28, x + long * 0.28))
    scene.add(CAR, *wheels, round_=True, colour=(45, 45, 45))


def add_person(scene: Scene, x: float, y: float, near: float) -> None:
    """Add a head over a body on two legs."""
    tall = 0.1 + 0.3 * near
    colour = any_colour(scene)
    half = tall * 0.05
    legs = [box(at - half, y - tall * 0.45, at + half, y) for at in (x - 2 * half, x + 2 * half)]
    body = box(x - tall * 0.17, y - tall * 0.82, x + tall * 0.17, y - tall * 0.4)
    scene.add(PERSON, body, *legs, colour=colour)
    head = [(x - tall * 0.09, y - tall), (x + tall * 0.09, y - tall * 0.8)]
    scene.add(PERSON, head, round_=True, colour=(195, 160, 135))


def add_pole(scene: Scene, x: float, y: float, near: float) -> None:
    """Add a lamp post: thin, tall, with an arm."""
    tall, thick = 0.3 + 0.5 * near, 0.018 + 0.02 * near
    arm = tall * 0.2 * math.copysign(1, scene.rng.uniform(-1, 1))
    top = y - tall
    scene.add(POLE, box(x - thick, top, x + thick, y), box(min(x, x + arm), top, max(x, x + arm), top + thick))


def write(out: Path, part: str, images: int, height_px: int, width_px: int) -> None:
    """Write images to out/part. Except for "unlabeled", also write masks and classes.txt."""
    of_images, of_masks = make_folders(out, part)
    for i in range(images):
        image, mask = drawn(part, i, height_px, width_px)
        image.save(of_images / f"{i:05d}.png")
        if of_masks:
            Image.fromarray(mask).save(of_masks / f"{i:05d}.png")
    if of_masks:
        (out / part / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Street scenes drawn with textures, with masks.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--unlabeled", type=int, default=2000)
    parser.add_argument("--train", type=int, default=50)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--height-px", type=int, default=96)
    parser.add_argument("--width-px", type=int, default=128)
    given = parser.parse_args(words)
    for part in PARTS:
        write(given.out, part, getattr(given, part), given.height_px, given.width_px)
    print(f"{given.out}: " + ", ".join(f"{getattr(given, part)} {part}" for part in PARTS))


if __name__ == "__main__":
    main()
