"""Draw reconstructions: of any images with a run's newest checkpoint, or of a run's own images through training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpp.data.decoding.decode import centre_box, decode_crop
from mpp.data.files import read_regular
from mpp.data.shards.reader import evenly, images_of
from mpp.drawing.sheets import save_png, sheet, stacked
from mpp.errors import BadImage, MppWarning, UserError
from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from mpp.objective.reconstruct import reconstruct as draw_predictions
from mpp.recipe.loading import load_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs import checkpoint
from mpp.runs.pictures import check_png, through_training, tile

OF_A_FOLDER = 8
"""Most images that are drawn of a folder."""


def reconstruct(run: str | Path, images: Sequence[str], out: str | Path) -> Path:
    """Draw the predictions of a pretraining run's newest checkpoint, as a PNG with a row for each image.

    Args:
        run: Folder of the run.
        images: Image files or folders; of a folder a few images are taken, spread evenly. If there are none, the images
            that the run kept through training are drawn, as a strip (.png) or an animation (.gif, .webp).
        out: File to write.

    Returns:
        The file.

    Raises:
        UserError: If the run or the images cannot be read, or no target of the run has a picture.
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
    reconstructions = draw_predictions(model, batch, units)
    if not reconstructions:
        names = ", ".join(o.name for o in model.objectives)
        raise UserError(f"{run}: target {names} has no picture")
    blocks = []
    for drawn in reconstructions:
        rows = [[tile(p.images[i]) for p in drawn.panels] for i in range(len(batch))]
        title = f"target {drawn.target}" if len(reconstructions) > 1 else None
        blocks.append(sheet(rows, [p.title for p in drawn.panels], title=title))
    return save_png(stacked(blocks), Path(out))


def _read_place(place: str, recipe: PretrainRecipe) -> list[Tensor]:
    """Read the image of a file, or a few images of a folder, spread evenly. Warn about unreadable ones in the folder.

    Raises:
        UserError: If the file, or every selected image of the folder, cannot be read.
    """
    if not os.path.isdir(place):
        return [_read(place, recipe)]
    names = images_of([place])
    images, faults = [], []
    for name in [names[i] for i in evenly(len(names), OF_A_FOLDER)]:
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
    """Read the central crop of an image file.

    Raises:
        UserError: If the file cannot be read.
    """
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
