"""Reconstructions as pictures: of any images by a run's checkpoint, and of the same few images through training."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from mpp import checkpoint
from mpp.build import build_mask, build_model
from mpp.data.decode import centre_box, decode_crop
from mpp.data.files import read_regular
from mpp.data.images import evenly, images_of
from mpp.data.loader import draw_masks
from mpp.diagnostics.kept import FOLDER, KEY, check_png, through_training
from mpp.diagnostics.sheets import save_png, scaled, sheet, stacked
from mpp.errors import BadImage, MppWarning, UserError
from mpp.model import Reconstruction
from mpp.recipe import PretrainRecipe, load_recipe

MOST_KEPT = 12
"""Steps that are kept of a run, besides the untrained model."""


# ---- of images, by a checkpoint --------------------------------------------------------------------------------------


OF_A_FOLDER = 8
"""Images that are drawn, where a folder is named."""


def reconstruct(run: str | Path, images: Sequence[str], out: str | Path) -> Path:
    """Draw what the newest checkpoint of a pretraining run predicts for images; a PNG, a row for each.

    images: files; of a folder a few are taken, evenly. Without any: the run's own through
    training, as a strip (.png) or an animation (.gif, .webp).
    UserError where run or images cannot be read, or no target of the run has a picture.
    """
    if not images:
        return through_training(run, out)
    for name in images:
        if Path(out).exists() and Path(name).exists() and Path(out).samefile(name):
            raise UserError(f"--out {out}: is one of the images; give another file")
    check_png(out)
    recipe = load_recipe(Path(run) / "recipe.yaml", PretrainRecipe)
    path = checkpoint.newest(Path(run) / "checkpoints")
    if path is None:
        raise UserError(f"{run}: no checkpoint to reconstruct with")
    model, grid = build_model(recipe)
    checkpoint.load(path, model)
    model.eval()
    batch = torch.stack([image for place in images for image in _read_place(place, recipe)])
    units = draw_masks(build_mask(recipe), grid, 0.5, recipe.seed, range(len(batch)))
    found = model.reconstruct(batch, units.hidden, units.noise, units.count)
    if not found:
        names = ", ".join(o.name for o in model.objectives)
        raise UserError(f"{run}: target {names}: has no picture; those with one: pixels, norm_pixels, colours, hog")
    blocks = []
    for drawn in found:
        rows = [[tile(p.images[i]) for p in drawn.panels] for i in range(len(batch))]
        title = f"target {drawn.target}" if len(found) > 1 else None
        blocks.append(sheet(rows, [p.title for p in drawn.panels], title=title))
    return save_png(stacked(blocks), Path(out))


def _read_place(place: str, recipe: PretrainRecipe) -> list[Tensor]:
    """The image of a file; of a folder a few, spread evenly, with a warning of those that cannot be read.

    Raises:
        UserError: The file, or every image looked at in the folder, cannot be read.
    """
    if not os.path.isdir(place):
        return [_read(place, recipe)]
    found = images_of([place])
    images, faults = [], []
    for name in [found[i] for i in evenly(len(found), OF_A_FOLDER)]:
        try:
            images.append(_read(name, recipe))
        except UserError as error:
            faults.append(str(error))
    if not images:
        raise UserError(f"{place}: not one image looked at can be read; the first: {faults[0]}")
    if faults:
        warnings.warn(f"{len(faults)} unreadable images are left out; the first: {faults[0]}", MppWarning, stacklevel=3)
    return images


def _read(name: str, recipe: PretrainRecipe) -> Tensor:
    """The central crop of an image file. UserError if it cannot be read."""
    data = recipe.data
    try:
        return decode_crop(
            read_regular(name),
            lambda w, h: centre_box(w, h, data.image_size),
            data.image_size,
            **data.decoding(),
        )
    except BadImage as error:
        raise UserError(f"{name}: {error}") from error


# ---- through training ------------------------------------------------------------------------------------------------


def kept_every(total_steps: int, measured_every: int) -> int:
    """Steps between two that are kept: a multiple of those between measurements, so that at most `MOST_KEPT` are."""
    return measured_every * max(-(-(total_steps // measured_every) // MOST_KEPT), 1)


def keep(run: Path, step: int, found: Sequence[Reconstruction]) -> None:
    """Write the pictures of the first target that has any: a grid of tiles, a row for each image."""
    if not found:
        return
    drawn = found[0]
    panels = [[_image(p.images[i]) for p in drawn.panels] for i in range(len(drawn.panels[0].images))]
    w, h = max(image.size for image in panels[0])  # glyphs are larger than the image they are of
    grid = Image.new("RGB", (w * len(panels[0]), h * len(panels)))
    for r, row in enumerate(panels):
        for c, image in enumerate(row):
            grid.paste(image.resize((w, h), Image.Resampling.NEAREST), (c * w, r * h))
    about = {"step": step, "target": drawn.target, "titles": [p.title for p in drawn.panels], "tile_px": [w, h]}
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps(about))
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / "step.tmp"
    grid.save(temporary, format="PNG", pnginfo=text)
    temporary.replace(folder / f"step-{step:08d}.png")


def _image(pixels: Tensor) -> Image.Image:
    """(C, h, w) in [0, 1] -> RGB."""
    array = (255 * pixels.float().cpu()).round().clamp(0, 255).byte()
    array = array[:3] if len(array) >= 3 else array[:1].expand(3, -1, -1)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def tile(pixels: Tensor) -> Image.Image:
    """(C, h, w) in [0, 1] -> a tile of a sheet."""
    return scaled(_image(pixels))
