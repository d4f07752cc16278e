"""The objective: corrupt -> encode -> predict -> loss on predicted cells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpp.data.batch import NOISE, Images, Units
from mpp.encoders.adapter import TimmEncoder
from mpp.encoders.cells import Cells, Corrupted, EncoderOutput, gather_cells, patchify, repeat_cells, unpatchify
from mpp.objective.agreement import Agreement
from mpp.objective.grid import group_cells, hidden_cells, lowest, visible_cells
from mpp.objective.interfaces import Corruption, Head, Loss, Target
from mpp.recipe.registry import named_with


class Objective(nn.Module):
    """One target with its head, its loss and its weight in the sum.

    Args:
        name: Key of the objective in the metrics.
        target: What is predicted.
        head: Head that predicts the target.
        loss: Loss between prediction and target.
        weight: Weight of the loss in the sum.
        where: Prefix of the objective's keys in the recipe, such as `extra_targets.0.`; empty for the main target.
    """

    def __init__(self, name: str, target: Target, head: Head, loss: Loss, weight: float = 1.0, where: str = "") -> None:
        super().__init__()
        self.name, self.weight, self.where = name, weight, where
        self.target = target
        self.head = head
        self.loss = loss


class MaskLayout(NamedTuple):
    """Mask of one batch, at each of its resolutions."""

    units: Units
    cells: Cells
    """Cells at which predictions and targets are compared."""
    encoder_cells: Cells
    """Cells of the encoder's output grid. They differ from `cells` only if mask units are smaller than the stride."""


class MaskedPatchModel(nn.Module):
    """Encoder, corruption and targets, trained together. Every target has its own head and loss.

    Args:
        encoder: Encoder made by `encoders.adapter.adapt`.
        corruption: What the encoder sees at hidden units.
        objectives: Targets with their heads and losses.
        unit_px: Side of a mask unit in pixels. It must be a multiple of the encoder's stride, or divide it.
        predict_fraction: Fraction of the hidden units to predict, at least one unit (CrossMAE, Fu et al. 2024).
        guide: Module that makes the mask from images, noise and count. None means that the batch's mask is used.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        agreement: Loss on the views of an image. None means that images have one view.
        views_apart: Whether the encoder gets the views of an image in separate batches.

    Raises:
        ValueError: If `unit_px` does not fit the stride, or a head does not fit the corruption or `unit_px`.
    """

    mean: Tensor
    std: Tensor
    weights: Tensor

    def __init__(
        self,
        encoder: TimmEncoder,
        corruption: Corruption,
        objectives: list[Objective],
        *,
        unit_px: int,
        predict_fraction: float,
        guide: nn.Module | None,
        mean: list[float],
        std: list[float],
        agreement: Agreement | None = None,
        views_apart: bool = False,
    ) -> None:
        super().__init__()
        self.cell_px = min(unit_px, encoder.stride)
        if unit_px % self.cell_px or encoder.stride % self.cell_px:
            raise ValueError(f"units of {unit_px} px do not fit cells of {encoder.stride} px")
        finer = unit_px < encoder.stride
        for o in objectives:
            if o.head.needs_hidden_tokens and not corruption.hidden_enter:
                allowed = ", ".join(named_with("head", needs_hidden_tokens=False))
                raise ValueError(
                    f"{o.where}head.name: this head reads the encoder's tokens of hidden cells, which this corruption "
                    f"never makes. Use one of {allowed}, or corruption.name: token"
                )
            if finer and not o.head.needs_hidden_tokens:
                allowed = ", ".join(named_with("head", needs_hidden_tokens=True))
                raise ValueError(
                    f"{o.where}head.name: mask units of {unit_px} px are parts of the encoder's cells of "
                    f"{encoder.stride} px, which this head cannot split into hidden and visible ones. "
                    f"Use one of {allowed}"
                )
        self.encoder, self.corruption, self.guide = encoder, corruption, guide
        self.objectives: Any = nn.ModuleList(objectives)
        self.unit_px, self.predict_fraction = unit_px, predict_fraction
        self.parts = encoder.stride // self.cell_px
        """Cells along a side of an encoder's cell: 1, unless mask units are smaller than the encoder's stride."""
        self.agreement, self.views_apart = agreement, views_apart
        self.views = agreement.views if agreement else 1
        self.only_predicted = agreement is None and not any(o.head.reads_visible for o in objectives)
        self.loss_names = [o.name for o in objectives] + ["agreement"] * (agreement is not None)
        self.loss_weights = [part.weight for part in (*objectives, agreement) if part is not None]
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.register_buffer("weights", torch.tensor(self.loss_weights), persistent=False)

    def images(self, raw: Tensor) -> Images:
        """Return images (B, C, H, W) with values in [0, 255] together with their normalised pixels."""
        return Images(raw, (raw - 255 * self.mean).div_(255 * self.std), self.mean, self.std)

    def layout(self, images: Images, units: Units, *, everything: bool = False) -> MaskLayout:
        """Find which cells are hidden and which are predicted.

        The predicted units are the hidden ones with the lowest noise.

        Args:
            images: Images of the batch, each once, which a guide may need.
            units: Mask of the batch, as drawn by the dataloader.
            everything: Whether to predict all hidden cells, regardless of `predict_fraction`.
        """
        if self.guide is not None:
            units = replace(units, hidden=self.guide(images, units.noise[:, NOISE["guide"]], units.count))
        mask, noise, count = units.hidden, units.noise, units.count
        factor = self.unit_px // self.cell_px
        hidden = repeat_cells(mask, factor)
        predicted_units = count if everything else max(round(self.predict_fraction * count), 1)
        chosen = mask
        if predicted_units < count:
            chosen = lowest(noise[:, NOISE["predict"]].masked_fill(~mask, 2.0), predicted_units)
        predicted = hidden_cells(repeat_cells(chosen, factor), predicted_units * factor * factor)
        cells = Cells(hidden, visible_cells(hidden, count * factor * factor), predicted)
        if self.parts == 1:
            return MaskLayout(units, cells, cells)
        coarse = group_cells(hidden, self.parts).any(-1)
        all_cells = torch.arange(coarse[0].numel(), device=mask.device).expand(len(mask), -1)
        return MaskLayout(units, cells, Cells(coarse, all_cells, all_cells))

    def predict(self, images: Images, layout: MaskLayout) -> list[Tensor]:
        """Return predictions (B, P, target.dim), one tensor for each objective."""
        return self._heads(self._encode(images, layout), layout)

    def _encode(self, images: Images, layout: MaskLayout) -> EncoderOutput:
        corrupted: Corrupted = self.corruption(images, layout.units)
        features: EncoderOutput = self.encoder(corrupted, layout.encoder_cells, only_predicted=self.only_predicted)
        return features

    def _heads(self, features: EncoderOutput, layout: MaskLayout) -> list[Tensor]:
        predictions = [o.head(features) for o in self.objectives]
        if self.parts == 1:
            return predictions
        grid = layout.encoder_cells.grid  # each encoder cell predicts all of its parts; keep the predicted ones
        fine = (patchify(unpatchify(p, self.parts, grid), 1) for p in predictions)
        return [gather_cells(p, layout.cells.predicted) for p in fine]

    def forward(self, raw: Tensor, units: Units) -> Tensor:
        """Return the unweighted losses of `loss_names`, those of the objectives over predicted cells.

        Args:
            raw: Images, (B, C, H, W) with values in [0, 255].
            units: Masks of the images. If there are B·M, each image is encoded once for each of its M masks. Targets
                are computed once for each image (data2vec 2.0, Baevski et al. 2023, section 3.2).
        """
        if self.agreement is None:
            return self._losses_and_features(raw, units)[0]
        passes = self.views if self.views_apart else 1
        losses, pooled = [], []
        for first in range(passes):
            rows = slice(first, None, passes)
            of_pass, features, layout = self._losses_and_features(raw[rows], units.of(rows))
            losses.append(of_pass)
            pooled.append(self._pool(features, layout))
        of_views = torch.stack(pooled, 1).reshape(-1, self.views, self.encoder.dim)
        return torch.cat([torch.stack(losses).mean(0), self.agreement(of_views).view(1)])

    def _losses_and_features(self, raw: Tensor, units: Units) -> tuple[Tensor, EncoderOutput, MaskLayout]:
        """Return the losses of the objectives from one pass of the encoder, its output, and the mask of the pass."""
        images = self.images(raw)
        masked = images.repeated(len(units.hidden) // len(raw))
        layout = self.layout(images, units)
        features = self._encode(masked, layout)
        losses = self._losses(self._heads(features, layout), self._targets(images, layout))
        return losses, features, layout

    def _pool(self, features: EncoderOutput, layout: MaskLayout) -> Tensor:
        """Return the mean token of the encoder's cells that are visible, at least in part: (B, D)."""
        if self.parts == 1:
            return features.visible().mean(1)
        hidden = group_cells(layout.cells.hidden, self.parts).all(-1)
        return (features.tokens * ~hidden.flatten(1).unsqueeze(-1)).sum(1) / (~hidden).sum((1, 2)).unsqueeze(-1)

    def _targets(self, images: Images, layout: MaskLayout) -> list[Tensor]:
        predicted = layout.cells.predicted
        of_each_image = predicted.reshape(len(images.raw), -1)  # the cells of all masks of an image, in one row
        return [o.target.at(images, of_each_image).reshape(*predicted.shape, -1) for o in self.objectives]

    def _losses(self, predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
        triples = zip(self.objectives, predictions, targets, strict=True)
        return torch.stack([o.loss(prediction, target) for o, prediction, target in triples])

    @torch.no_grad()
    def losses_for_skill(self, raw: Tensor, units: Units) -> tuple[Tensor, Tensor]:
        """Return the losses of the model and of the trivial predictors on the same cells, (objectives,) each."""
        images = self.images(raw)
        layout = self.layout(images, units)
        trivial = [
            gather_cells(o.target.trivial(images, layout.cells.hidden), layout.cells.predicted) for o in self.objectives
        ]
        targets = self._targets(images, layout)
        return self._losses(self.predict(images, layout), targets), self._losses(trivial, targets)

    def after_step(self, step: int, total_steps: int, made: Tensor) -> None:
        """Update the targets that follow the encoder. Called after every optimizer step.

        Args:
            step: Number of the step, from 1.
            total_steps: Number of steps in the run.
            made: Whether the step was made, see `Target.after_step`.
        """
        for o in self.objectives:
            o.target.after_step(self.encoder, step, total_steps, made)
