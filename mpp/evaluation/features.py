"""Compute the features of a frozen encoder by layer and pooling, and stream them to files."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError

PIXELS_SIDE = 32
"""Largest side of the shrunk images that the raw-pixel control reads: 3,072 numbers for RGB (guess)."""


class Place(NamedTuple):
    """The layer and pooling of features."""

    layer: str
    """"1", "2", …: output of a block or stage; "out": output of the timm model before its classifier; "pixels"."""
    pool: str
    """"mean" of the patch tokens, class "token", "attention" (of an attentive probe), or "own": the model's pooling."""

    def __str__(self) -> str:
        return self.layer if self.pool == "own" else f"layer {self.layer}, {self.pool}"


class Read(NamedTuple):
    """Features of a batch."""

    pooled: dict[Place, Tensor]
    """(B, D) float32 each"""
    tokens: dict[str, Tensor]
    """Layer -> (B, N, D) float32 patch tokens; empty unless requested, since they are large"""


class EncoderReader(nn.Module):
    """Reader of the features of a timm model, in eval mode and without gradients.

    Args:
        model: A timm model.
        layers: Numbers of the layers to read, from 1. None means all layers.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].

    Raises:
        UserError: If the model has no such layer, or no feature maps.
    """

    model: TimmModel
    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model.eval()
        info = getattr(model, "feature_info", None)
        if not hasattr(model, "forward_intermediates") or not info:
            raise UserError(f"encoder: timm's {type(model).__name__} has no forward_intermediates: no layers to read")
        depth = len(info)
        for layer in layers or ():
            if layer > depth:
                raise UserError(f"layers: {layer}: {type(model).__name__} has 1 to {depth} here")
        self.layers = sorted(set(layers)) if layers else list(range(1, depth + 1))
        takes = inspect.signature(self.model.forward_intermediates).parameters
        self.class_token = getattr(model, "cls_token", None) is not None and "return_prefix_tokens" in takes
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> EncoderReader:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, *, tokens: bool = False) -> Read:
        """Compute the features of (B, C, H, W) uint8 images, with the tokens if `tokens` is true."""
        x = (images.float() - self.mean) / self.std
        prefix = {"return_prefix_tokens": True} if self.class_token else {}
        out, maps = self.model.forward_intermediates(
            x, indices=[i - 1 for i in self.layers], norm=False, output_fmt="NCHW", **prefix
        )
        pooled, every = {}, {}
        for layer, layer_map in zip(map(str, self.layers), maps, strict=True):
            features, first = layer_map if self.class_token else (layer_map, None)
            if tokens:
                every[layer] = features.float().flatten(2).transpose(1, 2)
            pooled[Place(layer, "mean")] = features.float().mean((2, 3))
            if first is not None:
                pooled[Place(layer, "token")] = first[:, 0].float()
        pooled[Place("out", "own")] = self.model.forward_head(out, pre_logits=True).float()
        return Read(pooled, every)


class PixelReader(nn.Module):
    """Reader for the raw-pixel control: the image itself, with sides shrunk to at most `PIXELS_SIDE` px."""

    @torch.no_grad()
    def forward(self, images: Tensor, *, tokens: bool = False) -> Read:
        """Return the pixels of (B, C, H, W) uint8 images, scaled to [0, 1]. There are no tokens."""
        size = tuple(min(side, PIXELS_SIDE) for side in images.shape[-2:])
        x = images.float() / 255
        if size != tuple(x.shape[-2:]):
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return Read({Place("pixels", "own"): x.flatten(1)}, {})


class Table(NamedTuple):
    """Features of many images, in files."""

    features: dict[Place, np.ndarray]
    """(n, D) float32, memory-mapped from a file"""
    labels: np.ndarray
    """(n,) int64"""
    first: int
    """Number of rows that belong to the first part, which comes first."""
    unreadable: list[str]
    """A line for each image that could not be read"""


def read_table(
    reader: Callable[[Tensor], Read],
    batches: Iterable[Any],
    images: int,
    first: int,
    folder: Path,
    device: torch.device,
) -> Table:
    """Write the features of labeled images to .npy files. Unreadable images are left out.

    Args:
        reader: Returns the features of a batch of images.
        batches: Labeled batches.
        images: Number of images in all batches.
        first: Number of images in the first part, which comes first.
        folder: Folder for the files.
        device: Device on which features are computed.

    Raises:
        UserError: If the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Place, np.ndarray] = {}
    labels = np.empty(images, dtype=np.int64)
    seen = written = first_written = 0
    unreadable: list[str] = []
    for batch in batches:
        unreadable += batch.bad
        readable = batch.readable
        features = reader(batch.images.to(device)).pooled
        if not files:
            _check_space(folder, images * sum(4 * f.shape[1] for f in features.values()))
            files = {
                place: np.lib.format.open_memmap(
                    folder / f"{place.layer}-{place.pool}.npy", mode="w+", dtype=np.float32, shape=(images, f.shape[1])
                )
                for place, f in features.items()
            }
        count = int(readable.sum())
        for place, f in features.items():
            files[place][written : written + count] = f[readable.to(device)].cpu().numpy()
        labels[written : written + count] = batch.labels[readable].numpy()
        first_written += int(readable[: max(first - seen, 0)].sum())
        seen, written = seen + len(readable), written + count
    return Table({place: f[:written] for place, f in files.items()}, labels[:written], first_written, unreadable)


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"out: {folder}: the features take {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "give another folder, or fewer `layers`"
        )
