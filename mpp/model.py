"""The objective: corrupt -> encode -> predict -> loss on predicted cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpp.encoders.timm_encoder import TimmEncoder
from mpp.patches import hidden_cells, repeat_cells, visible_cells
from mpp.types import Cells, gather_cells


class Reconstruction(NamedTuple):
    """What `MaskedPatchModel.reconstruct` returns; images are normalised, (B, C, H, W)."""

    original: Tensor
    masked: Tensor
    borrowed: Tensor
    """Prediction at hidden cells, drawn with statistics of the hidden pixels where the target needs any."""
    unaided: Tensor
    """Prediction at hidden cells, drawn with nothing the model did not see."""


class MaskedPatchModel(nn.Module):
    """Mask × corruption × target × loss × head over one encoder.

    unit_px: side of a mask unit, a multiple of the encoder's stride (ValueError).
    predict_fraction: part of the hidden units that is predicted, at least one (CrossMAE, Fu et al. 2024).
    mean, std: of each channel, of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: TimmEncoder,
        corruption: Any,
        target: Any,
        loss: Any,
        head: Any,
        *,
        unit_px: int,
        predict_fraction: float,
        mean: list[float],
        std: list[float],
    ) -> None:
        super().__init__()
        if unit_px % encoder.stride:
            raise ValueError(f"mask.unit_px: must be a multiple of the encoder's stride, {encoder.stride} px")
        if head.needs_hidden_tokens and not corruption.hidden_enter:
            raise ValueError(
                "head.name: this head reads the encoder's tokens of hidden cells, which this corruption never "
                "makes. Allowed with it: transformer, cross_attention; or use corruption.name: token"
            )
        self.encoder, self.corruption, self.target, self.head = encoder, corruption, target, head
        self.loss = loss
        self.unit_px, self.predict_fraction = unit_px, predict_fraction
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> float32."""
        return (images.float() - self.mean) / self.std

    def cells(self, mask: Tensor, noise: Tensor, hidden_units: int) -> Cells:
        """(B, gh, gw) bool and float, on mask units -> the same on cells of the encoder's grid.

        The predicted units are the hidden ones with the lowest noise.
        """
        factor = self.unit_px // self.encoder.stride
        hidden = repeat_cells(mask, factor)
        hidden_count = hidden_units * factor * factor
        predicted_units = max(round(self.predict_fraction * hidden_units), 1)
        if predicted_units == hidden_units:
            predicted = hidden_cells(hidden, hidden_count)
        else:
            rank = noise.masked_fill(~mask, 2.0).flatten(1).argsort(dim=1)
            chosen = torch.zeros_like(mask).flatten(1).scatter(1, rank[:, :predicted_units], True)
            predicted = hidden_cells(repeat_cells(chosen.view_as(mask), factor), predicted_units * factor * factor)
        return Cells(hidden, visible_cells(hidden, hidden_count), predicted)

    def predict(self, images: Tensor, cells: Cells) -> Tensor:
        """Normalised images -> (B, P, target.dim)."""
        return self.head(self.encoder(self.corruption(images, cells)))

    def forward(self, images: Tensor, mask: Tensor, noise: Tensor, hidden_units: int) -> Tensor:
        """(B, C, H, W) uint8 images, masks on units -> the scalar loss over predicted cells."""
        x = self.normalise(images)
        cells = self.cells(mask, noise, hidden_units)
        prediction = self.predict(x, cells)
        return self.loss(prediction, gather_cells(self.target(x), cells.predicted))

    @torch.no_grad()
    def losses_for_skill(self, images: Tensor, mask: Tensor, noise: Tensor, hidden_units: int) -> tuple[Tensor, Tensor]:
        """(loss of the model, loss of the trivial predictor), both on the same predicted cells."""
        x = self.normalise(images)
        cells = self.cells(mask, noise, hidden_units)
        target = gather_cells(self.target(x), cells.predicted)
        trivial = gather_cells(self.target.trivial(x, cells.hidden), cells.predicted)
        return self.loss(self.predict(x, cells), target), self.loss(trivial, target)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor, hidden_units: int) -> Reconstruction:
        """(B, C, H, W) uint8 -> pictures; every hidden cell is predicted, whatever `predict_fraction` says."""
        x = self.normalise(images)
        cells = self.cells(mask, torch.zeros_like(mask, dtype=torch.float32), hidden_units)
        everywhere = Cells(
            cells.hidden,
            cells.visible,
            hidden_cells(cells.hidden, cells.hidden[0].numel() - cells.visible.shape[1]),
        )
        prediction = self.predict(x, everywhere).float()
        values = torch.zeros(len(x), cells.hidden[0].numel(), self.target.dim, device=x.device)
        index = everywhere.predicted.unsqueeze(-1).expand_as(prediction)
        values = values.scatter(1, index, prediction)
        pixels = repeat_cells(cells.hidden, self.encoder.stride).unsqueeze(1)
        pictures = [
            torch.where(pixels, self.target.picture(values, x, cells.hidden, borrow=borrow), x)
            for borrow in (True, False)
        ]
        return Reconstruction(x, x.masked_fill(pixels, 0.0), *pictures)
