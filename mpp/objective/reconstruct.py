"""Draw what a model predicts for hidden cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.data.batch import Images, Units
from mpp.encoders.cells import repeat_cells
from mpp.objective.model import MaskedPatchModel, Objective
from mpp.runs.pictures import BORROWED, GREY, Panel, Reconstruction


@torch.no_grad()
def reconstruct(model: MaskedPatchModel, raw: Tensor, units: Units) -> list[Reconstruction]:
    """Draw the predictions for all hidden cells, for each target that has a picture.

    Args:
        model: Model in eval mode, on the device of the tensors.
        raw: Images, (B, C, H, W) with values in [0, 255].
        units: Masks of the images.
    """
    images = model.images(raw)
    layout = model.layout(images, units, everything=True)
    hidden = layout.cells.hidden
    reconstructions = []
    for o, prediction in zip(model.objectives, model.predict(images, layout), strict=True):
        values = torch.zeros(len(raw), hidden[0].numel(), prediction.shape[-1], device=raw.device)
        index = layout.cells.predicted.unsqueeze(-1).expand_as(prediction)
        values = values.scatter(1, index, prediction.float())
        pixels = repeat_cells(hidden, model.cell_px).unsqueeze(1)
        original = raw.float() / 255
        shown = _glyph_panels(o, values, images, pixels, layout.cells.grid)
        if shown is None:
            shown = _pixel_panels(model, o, values, images, hidden, pixels)
        if shown is not None:
            first = [Panel("original", original), Panel("masked", original.masked_fill(pixels, GREY))]
            reconstructions.append(Reconstruction(o.name, first + shown))
    return reconstructions


def _glyph_panels(
    o: Objective, values: Tensor, images: Images, pixels: Tensor, grid: tuple[int, int]
) -> list[Panel] | None:
    """Return the panels of a target whose values are drawn as glyphs, or None if they are not.

    Args:
        o: Objective of the target.
        values: Predictions, (B, N, dim).
        images: Images that were predicted.
        pixels: Hidden pixels, (B, 1, H, W) bool.
        grid: Grid of cells (gh, gw).
    """
    predicted = o.target.glyphs(values, grid)
    if predicted is None:
        return None
    truth = o.target.glyphs(o.target(images), grid)
    assert truth is not None
    drawn = pixels.repeat_interleave(truth.shape[-2] // pixels.shape[-2], 2)
    drawn = drawn.repeat_interleave(truth.shape[-1] // pixels.shape[-1], 3)
    return [
        Panel("target", truth),
        Panel("predicted", predicted.masked_fill(~drawn, 0.0)),
        Panel("pasted", torch.where(drawn, predicted, truth)),
    ]


def _pixel_panels(
    model: MaskedPatchModel, o: Objective, values: Tensor, images: Images, hidden: Tensor, pixels: Tensor
) -> list[Panel] | None:
    """Return the panels of a target whose values are drawn as pixels, or None if it has no picture."""
    original = images.raw.float() / 255
    unaided, borrowed = (_draw(model, o, values, images, hidden, borrow) for borrow in (False, True))
    if unaided is None or borrowed is None:
        return None
    panels = []
    if o.target.of == "classes":
        logits = F.one_hot(o.target(images), o.target.classes).float().flatten(2)
        truth = _draw(model, o, logits, images, hidden, False)
        panels += [Panel("target", truth)] if truth is not None else []
    panels += [Panel("predicted", unaided.masked_fill(~pixels, GREY))]
    panels += [Panel("pasted", torch.where(pixels, unaided, original))]
    if not torch.equal(unaided, borrowed):
        panels += [Panel(BORROWED, torch.where(pixels, borrowed, original))]
    return panels


def _draw(
    model: MaskedPatchModel, o: Objective, values: Tensor, images: Images, hidden: Tensor, borrow: bool
) -> Tensor | None:
    """Return the picture of the values, (B, C, H, W) in [0, 1], or None if the target has no picture."""
    picture = o.target.picture(values, images, hidden, borrow=borrow)
    return None if picture is None else (picture * model.std + model.mean).clamp(0, 1)
