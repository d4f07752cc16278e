"""Draw a colour picture for the README: photographs, the same with hidden patches, and what a small MAE predicts there.

    python tools/hero_picture.py docs/hero.png      about 25 minutes on one CPU core

Crops of colour photographs inside scikit-image that may be shown (see tools/demo_images.py). The MAE is trained on the
left part of each photograph; the picture shows crops of the right part, with a gap between.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

import mpp
from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from mpp.objective.reconstruct import reconstruct
from mpp.recipe.loading import load_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs import checkpoint
from mpp.runs.pictures import tile

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
TRAIN_PART, SHOWN_PART = 0.62, 0.35
"""Parts of the width of a photograph, from the left and from the right."""
CROPS, CROP_PX, SIDE_PX = 1000, 96, (110, 220)
"""Crops of each photograph to train on, their size, and the sides of the squares that are scaled to it."""
FONT_PX, GAP_PX, LABEL_PX = 14, 4, 76
RECIPE = {
    "job": "pretrain",
    "data": {"image_size": CROP_PX, "crop_scale": [0.5, 1.0], "held_out": 64, "workers": 0},
    "encoder": {
        "name": "vit_tiny_patch16_224",
        "args": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    },
    "mask": {"name": "uniform", "ratio": 0.6},
    "corruption": "drop",
    "target": "pixels",
    "head": {"name": "transformer", "dim": 128, "depth": 1},
    "optim": {"global_batch_size": 64, "base_lr": 4e-3, "steps": 3000, "warmup_steps": 200},
    "log_every_steps": 200,
    "skill_every_steps": 2000,
    "reconstruct_images": 0,
}


def cut_squares(name: str, rng: np.random.Generator) -> tuple[list[Image.Image], Image.Image]:
    """Return random squares of the left part of a photograph, and the central square of its right part."""
    photograph = Image.fromarray(getattr(data, name)())
    width, height = photograph.size
    squares = []
    for _ in range(CROPS):
        side = int(rng.integers(SIDE_PX[0], min(SIDE_PX[1], height) + 1))
        left, top = rng.integers(0, int(width * TRAIN_PART) - side + 1), rng.integers(0, height - side + 1)
        squares.append(photograph.crop((left, top, left + side, top + side)))
    side = min(int(width * SHOWN_PART), SIDE_PX[1], height)
    left, top = width - int(width * SHOWN_PART), (height - side) // 2
    shown = photograph.crop((left, top, left + side, top + side))
    size = (CROP_PX, CROP_PX)
    return [square.resize(size, Image.Resampling.LANCZOS) for square in squares], shown.resize(size)


def predict(run: Path, images: list[Image.Image]) -> dict[str, list[Image.Image]]:
    """Return the rows of the picture: title -> one tile for each image."""
    recipe = load_recipe(run / "recipe.yaml", PretrainRecipe)
    model, grid = build_model(recipe)
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    checkpoint.load(newest, model)
    batch = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    units = draw_masks(build_mask(recipe), grid, 0.5, recipe.seed, range(len(batch)))
    (drawn,) = reconstruct(model.eval(), batch, units)
    panels = {panel.title: [tile(panel.images[i]) for i in range(len(batch))] for panel in drawn.panels}
    return {"original": panels["original"], "masked": panels["masked"], "predicted": panels["pasted"]}


def draw(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Return the picture: a row for each title, a column for each image."""
    (w, h), columns = rows["original"][0].size, len(rows["original"])
    size = (LABEL_PX + columns * (w + GAP_PX), len(rows) * (h + GAP_PX))
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_PX)
    for r, (title, tiles) in enumerate(rows.items()):
        pen.text((0, r * (h + GAP_PX) + (h - FONT_PX) // 2), title, fill="black", font=font)
        for c, image in enumerate(tiles):
            picture.paste(image, (LABEL_PX + c * (w + GAP_PX), r * (h + GAP_PX)))
    return picture


def main(out: Path) -> None:
    rng = np.random.default_rng(0)
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        crops = Path(folder) / "crops"
        crops.mkdir()
        for name in PHOTOGRAPHS:
            squares, right = cut_squares(name, rng)
            shown.append(right)
            for i, square in enumerate(squares):
                square.save(crops / f"{name}-{i:04d}.png")
        mpp.pretrain(RECIPE, out=Path(folder) / "run", **{"data.shards": str(crops)})
        draw(predict(Path(folder) / "run", shown)).save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
