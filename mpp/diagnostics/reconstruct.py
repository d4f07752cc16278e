"""Reconstructions as a picture: original, masked, and the prediction drawn in two ways, each labelled."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mpp import checkpoint
from mpp.build import build_mask, build_model
from mpp.data.decode import centre_box, decode_crop
from mpp.data.loader import draw_masks
from mpp.errors import BadImage, UserError
from mpp.recipe import PretrainRecipe, load_recipe

COLUMNS = ("original", "masked", "predicted,\nown statistics borrowed", "predicted,\nunaided")
TILE_PX = 160
HEADER_PX = 36
GAP_PX = 4


def reconstruct(run: str | Path, images: list[str], out: str | Path) -> Path:
    """Draw what the newest checkpoint of a pretraining run predicts for image files; a PNG.

    "own statistics borrowed" draws each hidden patch with its own mean and contrast, which the model never
    predicted where the target is normalised pixels; "unaided" uses the visible pixels' instead.
    UserError where run or images cannot be read.
    """
    for name in images:
        if Path(out).exists() and Path(name).exists() and Path(out).samefile(name):
            raise UserError(f"--out {out}: is one of the images; give another file")
    recipe = load_recipe(Path(run) / "recipe.yaml", PretrainRecipe)
    path = checkpoint.newest(Path(run) / "checkpoints")
    if path is None:
        raise UserError(f"{run}: no checkpoint to reconstruct with")
    model, grid = build_model(recipe)
    checkpoint.load(path, model)
    model.eval()
    batch = torch.stack([_read(name, recipe) for name in images])
    units = draw_masks(build_mask(recipe), grid, 0.5, recipe.seed, range(len(images)))
    try:
        pictures = model.reconstruct(batch, units.hidden, units.noise, units.count)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from error
    pixels = [(255 * (p * model.std + model.mean)).clamp(0, 255).byte() for p in pictures]
    _draw([[p[i] for p in pixels] for i in range(len(images))], Path(out))
    return Path(out)


def _read(name: str, recipe: PretrainRecipe) -> Tensor:
    data = recipe.data
    try:
        return decode_crop(
            Path(name).read_bytes(),
            lambda w, h: centre_box(w, h, data.image_size),
            data.image_size,
            **data.decoding(),
        )
    except (OSError, BadImage) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _draw(rows: list[list[Tensor]], out: Path) -> None:
    h, w = rows[0][0].shape[-2:]
    scale = max(round(TILE_PX / max(h, w)), 1) if max(h, w) < TILE_PX else 1
    tile_w, tile_h = w * scale, h * scale
    width = len(COLUMNS) * (tile_w + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (width, HEADER_PX + len(rows) * (tile_h + GAP_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, text in enumerate(COLUMNS):
        pen.multiline_text((GAP_PX + c * (tile_w + GAP_PX), 2), text, fill="black")
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            array = tile[:3].permute(1, 2, 0).numpy() if len(tile) >= 3 else tile[0].numpy()
            image = Image.fromarray(array).convert("RGB").resize((tile_w, tile_h), Image.Resampling.NEAREST)
            sheet.paste(image, (GAP_PX + c * (tile_w + GAP_PX), HEADER_PX + r * (tile_h + GAP_PX)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
