"""Run images through an encoder once and collect the sums from which the views of `mpp inspect` are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.encoders.timm_model import TimmModel
from mpp.inspection import measures
from mpp.inspection.measures import CkaTable
from mpp.inspection.reading import AttentionRecorder, Passed, TokenPlaces, blocks, layout_of, watched
from mpp.recipe.sections import Decoding

BATCH = 32
"""Images in a minibatch of CKA."""
ATTENTION_BATCH = 4
"""Images at a time for attention, whose weights are large."""
NOTHING = 1e-6
"""If a block adds less than this fraction of its input's norm, it counts as rounding."""
MOST_CELLS = 16
"""Most cells along a side when pairs of places are compared; larger maps are averaged down."""


@dataclass
class InspectedEncoder:
    """An encoder with the format of its input images."""

    name: str
    model: TimmModel
    size: tuple[int, int]
    channels: int
    mean: Tensor
    std: Tensor
    decoding: Decoding
    """Keyword arguments of `decode_crop` for its images"""

    def normalised(self, raw: Tensor) -> Tensor:
        return (raw.to(self.mean.device).float() / 255 - self.mean) / self.std

    def maps(self, raw: Tensor) -> list[Tensor]:
        """Return the output of every block or stage, (B, D, h, w) without a norm.

        Args:
            raw: Images, (B, C, H, W) in [0, 255].
        """
        return list(
            self.model.forward_intermediates(
                self.normalised(raw), norm=False, output_fmt="NCHW", intermediates_only=True
            )
        )


class Layer(NamedTuple):
    """Measurements of the feature maps of one block or stage, by minibatch or summed over them."""

    pooled: list[Tensor]
    """(B, D) mean over all places, of each minibatch"""
    cosines: list[Tensor]
    """(N, N) of each minibatch, of tokens minus their mean over images and places"""
    raw_similarity: list[float]
    """Mean cosine between the tokens of an image, of each minibatch"""
    origin: CkaTable
    """CKA between the token at each place and the pixels at each place"""
    mean_map: Tensor
    """(D, h, w) mean over all images"""


@dataclass
class Seen:
    """Everything recorded in one pass over all images."""

    subject: InspectedEncoder
    shown: Tensor
    """(shown, C, H, W) images that are drawn, uint8 or float32 in [0, 255]"""
    shown_maps: list[Tensor]
    layers: list[Layer]
    grids: list[tuple[int, int]]
    """Grid of each layer, after averaging down to `MOST_CELLS`."""
    block_names: list[str]
    own: CkaTable = field(default_factory=CkaTable)
    own_updates: CkaTable = field(default_factory=CkaTable)
    updates: list[int] = field(default_factory=list)
    """Numbers of the blocks whose input and output have the same shape."""
    skip_over_branch: list[list[float]] = field(default_factory=list)
    other: CkaTable | None = None
    cross: CkaTable | None = None
    cross_updates: CkaTable | None = None


def _smaller(maps: Tensor) -> Tensor:
    """Average (B, D, h, w) maps down to at most `MOST_CELLS` cells along a side."""
    h, w = maps.shape[-2:]
    return F.adaptive_avg_pool2d(maps, (min(h, MOST_CELLS), min(w, MOST_CELLS)))


def _patches(raw: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the pixels under each cell: (n, C, H, W) in [0, 255] -> (n, N, C·p·p) float.

    If a cell is larger than 8 px, its pixels are shrunk to 8 px.
    """
    side = (min(raw.shape[-2] // grid[0], 8), min(raw.shape[-1] // grid[1], 8))
    x = F.interpolate(raw.float(), (grid[0] * side[0], grid[1] * side[1]), mode="area")
    x = x.unflatten(3, (grid[1], side[1])).unflatten(2, (grid[0], side[0]))  # (n, C, gh, a, gw, b)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@torch.no_grad()
def see_all(subjects: Sequence[InspectedEncoder], images: Sequence[Tensor], shown: int) -> Seen:
    """Run all images through the encoders once.

    Args:
        subjects: The encoder to measure. A second encoder is optional; only CKA is measured of it.
        images: (n, C, H, W) images for each encoder, uint8 or float32 in [0, 255].
        shown: Number of images that are drawn, from the start.
    """
    subject = subjects[0]
    n = len(images[0])
    parts = np.array_split(np.arange(n), max(n // BATCH, 1))
    first = subject.maps(images[0][:shown])
    grids = [tuple(_smaller(m).shape[-2:]) for m in first]
    watched_blocks = [blocks(s.model) for s in subjects]
    seen = Seen(
        subject,
        images[0][:shown],
        first,
        [Layer([], [], [], CkaTable(), torch.zeros_like(m[0], dtype=torch.float32)) for m in first],
        [(int(h), int(w)) for h, w in grids],
        [name for name, _ in watched_blocks[0]] or [f"stage {i + 1}" for i in range(len(first))],
        skip_over_branch=[[] for _ in watched_blocks[0]],
    )
    if len(subjects) > 1:
        seen.other, seen.cross, seen.cross_updates = CkaTable(), CkaTable(), CkaTable()
    for part in parts:
        grams: list[Tensor] = []
        updates: list[Tensor] = []
        for number, s in enumerate(subjects):
            raw = images[number][part]
            of_block: dict[int, Tensor] = {}
            of_update: dict[int, Tensor] = {}

            def see(
                i: int, passed: Passed, is_first: bool = number == 0, a: Any = of_block, b: Any = of_update
            ) -> None:
                a[i] = measures.gram(passed.after)
                if passed.before.shape == passed.after.shape:
                    branch = passed.after - passed.before
                    b[i] = measures.gram(branch)
                    if is_first:
                        skip, added = (x.float().flatten(1).norm(dim=1) for x in (passed.before, branch))
                        there = added > NOTHING * skip
                        seen.skip_over_branch[i] += (skip[there] / added[there]).tolist()

            with watched([module for _, module in watched_blocks[number]], see):
                maps = s.maps(raw)
            if not of_block:  # if there are no residual blocks, use the stages
                of_block = {i: measures.gram(m) for i, m in enumerate(maps)}
            grams.append(torch.stack([of_block[i] for i in sorted(of_block)]))
            if of_update:
                updates.append(torch.stack([of_update[i] for i in sorted(of_update)]))
            if number == 0:
                seen.updates = sorted(of_update)
                pixels: dict[tuple[int, int], Tensor] = {}  # by grid: in plain encoders all layers share one
                for layer, grid, feature_map in zip(seen.layers, seen.grids, maps, strict=True):
                    tokens = _smaller(feature_map.float()).flatten(2).transpose(1, 2)
                    layer.mean_map.add_(feature_map.float().sum(0) / n)
                    layer.pooled.append(feature_map.float().mean((2, 3)).cpu())
                    layer.raw_similarity.append(measures.token_similarity(tokens))
                    layer.cosines.append(measures.cosine_map(tokens - tokens.mean((0, 1))))
                    if grid not in pixels:
                        pixels[grid] = measures.grams(_patches(raw.to(tokens.device), grid))
                    layer.origin.add(measures.grams(tokens), pixels[grid])
        seen.own.add(grams[0], grams[0])
        if seen.updates:
            seen.own_updates.add(updates[0], updates[0])
        if seen.other is not None and seen.cross is not None and seen.cross_updates is not None:
            seen.other.add(grams[1], grams[1])
            seen.cross.add(grams[0], grams[1])
            if len(updates) > 1:
                seen.cross_updates.add(updates[0], updates[1])
    return seen


@dataclass
class Attention:
    """Measurements of one attention layer."""

    layout: TokenPlaces | str
    """Places of the tokens, or why they are not known"""
    distance: Tensor | None = None
    """(heads,) mean attention distance in pixels over all images; None if the places are not known"""
    entropy: Tensor | None = None
    """(heads,) entropy relative to even attention, in [0, 1]; None if the places are not known"""
    whole: list[Tensor] = field(default_factory=list)
    """(B, T, T) mean over heads, of the shown images; empty unless every place attends to every place"""


@torch.no_grad()
def attend(subject: InspectedEncoder, raw: Tensor, shown: int) -> list[Attention]:
    """Record the attention of a model, in the order of computation; [] for a model without attention.

    Args:
        subject: The encoder.
        raw: (n, C, H, W) images, uint8 or float32 in [0, 255].
        shown: Number of images whose whole attention is kept, from the start.
    """
    attentions: list[Attention] = []
    for start in range(0, len(raw), ATTENTION_BATCH):
        images = raw[start : start + ATTENTION_BATCH]
        wanted = max(min(shown - start, len(images)), 0)

        def keep(weights: Tensor, batch: int = len(images), wanted: int = wanted) -> Any:
            layout = layout_of(subject.model, tuple(weights.shape), batch, subject.size)
            if isinstance(layout, str):
                return layout, None, None, None
            patches = weights[:, :, layout.prefix :, layout.prefix :]
            whole = weights[:wanted].mean(1) if layout.everywhere else None
            distance = measures.mean_attention_distance(patches, layout.queries, layout.keys)
            return layout, distance.cpu(), measures.attention_entropy(patches).cpu(), whole

        with AttentionRecorder(keep) as recorder:
            subject.maps(images)
        if not attentions:
            attentions = [Attention(layout) for layout, *_ in recorder.found]
        for attention, (layout, distance, entropy, whole) in zip(attentions, recorder.found, strict=True):
            attention.layout = layout
            if distance is not None:
                part = len(images) / len(raw)
                attention.distance = distance * part + (0 if attention.distance is None else attention.distance)
                attention.entropy = entropy * part + (0 if attention.entropy is None else attention.entropy)
            if whole is not None:
                attention.whole.append(whole.cpu())
    return attentions
