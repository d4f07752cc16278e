"""Maps of an encoder at several strides, for tasks that predict at every place.

Hierarchical encoders have them (top-down additions, FPN, Lin et al. 2017); from the maps of a plain one they are
made by transposed convolutions and pooling (ViTDet's simple feature pyramid, Li et al. 2022, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mpp.encoders.maps import FeatureMaps

COARSEST = 0.5
"""Over a plain encoder of stride s the last level's stride is 2s, as ViTDet's is: 4, 8, 16, 32 px at patches of 16."""


class MapNorm(nn.Module):
    """LayerNorm over the channels of (B, D, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """The maps of an encoder brought to maps of one width, finest first; `strides` are the levels', in pixels.

    Args:
        maps: What the encoder gives.
        width: Channels of every level.
        finest: Cells of the first level along a cell of a plain encoder, a power of 2.
        last_only: Of a plain encoder take the last map alone for every level, as ViTDet; else the first maps make the
            finest levels, as in BEiT's segmenter.
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
        """(B, D_i, h_i, w_i) each -> (B, width, H / stride, W / stride) each."""
        levels = [
            lateral(scale(maps[i])) for i, scale, lateral in zip(self.sources, self.scales, self.lateral, strict=True)
        ]
        if not self.plain:
            for i in range(len(levels) - 2, -1, -1):
                levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        return [out(level) for out, level in zip(self.out, levels, strict=True)]


def _width_after(dim: int, factor: float) -> int:
    """Transposed convolutions halve the width each time, as ViTDet's do, down to 32."""
    return dim if factor <= 1 else max(dim // round(factor), min(dim, 32))


def _rescaled(dim: int, factor: float) -> nn.Sequential:
    """Raw blocks have scales of their own: a norm before anything else."""
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
