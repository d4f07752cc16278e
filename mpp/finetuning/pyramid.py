"""Feature maps of an encoder at several strides, for tasks that predict at every place.

Hierarchical encoders already have maps at several strides, which are combined by top-down additions (FPN, Lin et al.
2017). For a plain encoder, transposed convolutions and pooling make the levels (ViTDet's simple feature pyramid, Li et
al. 2022, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mpp.encoders.maps import FeatureMaps

COARSEST = 0.5
"""Cells of the last level along a cell of a plain encoder. So its stride is twice the encoder's, as in ViTDet: 4, 8, 16
and 32 px for patches of 16 px."""


class MapNorm(nn.Module):
    """LayerNorm over the channels of (B, D, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """A feature pyramid with one width for all levels, finest first. `strides` are those of the levels, in pixels.

    Args:
        maps: Widths and strides of the encoder's feature maps.
        width: Channels of every level.
        finest: Cells of the first level along each side of a cell of a plain encoder, a power of 2. Hierarchical
            encoders ignore it.
        last_only: Whether every level over a plain encoder is made from its last map, as in ViTDet. Otherwise the first
            maps make the finest levels, as in BEiT's segmenter.
    """

    def __init__(self, maps: FeatureMaps, width: int, *, finest: int, last_only: bool) -> None:
        super().__init__()
        self.plain = len(set(maps.strides)) == 1
        if self.plain:
            factors = [float(finest)]
            while factors[-1] > COARSEST:
                factors.append(factors[-1] / 2)
            last = len(maps.dims) - 1
            sources = [last if last_only else round(i * last / (len(factors) - 1)) for i in range(len(factors))]
        else:
            sources = list(range(len(maps.dims)))
            factors = [1.0] * len(sources)
        self.sources = sources
        self.strides = [maps.strides[i] / factor for i, factor in zip(sources, factors, strict=True)]
        self.scales = nn.ModuleList(_rescaled(maps.dims[i], factor) for i, factor in zip(sources, factors, strict=True))
        inner = [_width_after(maps.dims[i], factor) for i, factor in zip(sources, factors, strict=True)]
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(d, width, 1, bias=False), MapNorm(width)) for d in inner)
        self.out = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), MapNorm(width)) for _ in sources
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute the levels: maps (B, D_i, h_i, w_i) -> (B, width, H / stride, W / stride) each."""
        levels = [
            lateral(scale(maps[i])) for i, scale, lateral in zip(self.sources, self.scales, self.lateral, strict=True)
        ]
        if not self.plain:
            for i in range(len(levels) - 2, -1, -1):
                levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        return [out(level) for out, level in zip(self.out, levels, strict=True)]


def _width_after(dim: int, factor: float) -> int:
    """Return the channels of a map that is enlarged by `factor`.

    Each transposed convolution halves the channels, as in ViTDet, down to 32.
    """
    return dim if factor <= 1 else max(dim // round(factor), min(dim, 32))


def _rescaled(dim: int, factor: float) -> nn.Sequential:
    """Return layers that enlarge a map by `factor`, or halve it.

    They begin with a norm, because the raw outputs of blocks have different scales.
    """
    layers: list[nn.Module] = [MapNorm(dim)]
    if factor < 1:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    step, width = 1, dim
    while step < factor:
        step *= 2
        if step > 2:
            layers += [MapNorm(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, _width_after(dim, step), 2, stride=2))
        width = _width_after(dim, step)
    return nn.Sequential(*layers)
