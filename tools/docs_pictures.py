"""Draw the pictures of the README and the guides, from a small MAE that learns from colour photographs.

    python tools/docs_pictures.py docs      about half an hour on one CPU core

The photographs are those inside scikit-image that may be shown (see tools/demo_images.py). The MAE learns from crops of
the left part of each; the pictures show crops of the right part, with a gap between. If it is stopped, the same
command continues.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from skimage import data

import mpp
from mpp.inspection.reconstruct import reconstruct
from mpp.recipe.flat import JsonObject

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
TRAIN_PART, SHOWN_PART = 0.62, 0.35
"""Parts of the width of a photograph, from the left and from the right."""
CROP_PX, SIDE_PX = 96, (110, 220)
"""Side of a crop, and the sides of the squares that are scaled to it."""
TRAINED, SHOWN = 600, 8
"""Crops of each photograph."""
IN_README = ("chelsea-0001", "astronaut-0006", "coffee-0005")
VIEWS = ("attention_distance", "attention_maps", "similarity", "spectrum", "positions", "colours")
"""Pictures of `mpp inspect` that the guide on looking at results explains."""
RECIPE: JsonObject = {
    "job": "pretrain",
    "data": {"image_size": CROP_PX, "crop_scale": [0.5, 1.0], "held_out": 48, "workers": 0},
    "encoder": {
        "name": "vit_tiny_patch16_224",
        "args": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    },
    "mask": {"name": "uniform", "ratio": 0.6},
    "corruption": "drop",
    "target": "pixels",
    "head": {"name": "transformer", "dim": 128, "depth": 1},
    "optim": {"global_batch_size": 64, "base_lr": 4e-3, "steps": 1200, "warmup_steps": 100},
    "log_every_steps": 100,
    "checkpoint_every_steps": 200,
    "skill_every_steps": 300,
}


def cut_squares(photograph: Image.Image, left: int, right: int, count: int, seed: int) -> list[Image.Image]:
    """Return random squares between two columns of a photograph, scaled to CROP_PX."""
    rng = np.random.default_rng(seed)
    squares = []
    for _ in range(count):
        side = int(rng.integers(SIDE_PX[0], min(SIDE_PX[1], photograph.height, right - left) + 1))
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, photograph.height - side + 1))
        square = photograph.crop((x, y, x + side, y + side))
        squares.append(square.resize((CROP_PX, CROP_PX), Image.Resampling.LANCZOS))
    return squares


def write_crops(folder: Path, trained: int) -> None:
    """Write crops of the left part of each photograph to folder/train, and of the right part to folder/shown."""
    for seed, name in enumerate(PHOTOGRAPHS):
        photograph = Image.fromarray(getattr(data, name)())
        width = photograph.width
        parts = (("train", 0, int(width * TRAIN_PART), trained), ("shown", int(width * (1 - SHOWN_PART)), width, SHOWN))
        for part, left, right, count in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            for i, square in enumerate(cut_squares(photograph, left, right, count, seed)):
                square.save(folder / part / f"{name}-{i:04d}.png")


def draw_duplicates(crops: Path, out: Path) -> None:
    """Draw the least similar near duplicates among crops of photographs and altered copies of some of them."""
    altered = crops / "altered"
    altered.mkdir(exist_ok=True)
    margin = round(0.025 * CROP_PX)
    for i, path in enumerate(sorted((crops / "shown").glob("*-000[0-3].png"))):
        image = Image.open(path)
        smaller = image.resize((CROP_PX * 3 // 4, CROP_PX * 3 // 4), Image.Resampling.LANCZOS)
        cropped = image.crop((margin, margin, CROP_PX - margin, CROP_PX - margin))
        brighter = ImageEnhance.Brightness(image).enhance(1.2)
        copy = (image, smaller, cropped, brighter)[i % 4]
        copy.save(altered / f"{path.stem}.jpg", quality=50 if i % 4 == 0 else 90)
    mpp.duplicates([str(altered)], [str(crops / "shown")], picture=out / "duplicates.png")


def draw(run: Path, crops: Path, out: Path) -> None:
    """Draw every picture of a finished run into a folder."""
    shown = [str(crops / "shown" / f"{name}.png") for name in IN_README]
    reconstruct(run, shown, out / "hero.png")
    draw_duplicates(crops, out)
    reconstruct(run, [], out / "reconstructions.png")
    mpp.inspect(run, [str(crops / "shown")], images=SHOWN * len(PHOTOGRAPHS))
    for view in VIEWS:
        shutil.copy(run / "inspect" / f"{view}.png", out / f"{view}.png")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the README and the guides.")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--run", type=Path, default=Path("runs/docs-pictures"), help="folder for crops and run")
    parser.add_argument("--steps", type=int, default=RECIPE["optim"]["steps"], help="training steps")
    args = parser.parse_args(words)
    crops, run = args.run / "crops", args.run / "run"
    write_crops(crops, TRAINED)
    steps = {"optim.steps": args.steps, "optim.warmup_steps": min(args.steps, RECIPE["optim"]["warmup_steps"])}
    mpp.pretrain(RECIPE, out=run, resume="auto", **{"data.shards": str(crops / "train")}, **steps)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(run, crops, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
