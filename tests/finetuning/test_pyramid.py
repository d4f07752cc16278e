"""A pyramid has the given strides over plain and hierarchical encoders, and uses every map and weight."""

from __future__ import annotations

import pytest
import torch

from mpp.encoders.maps import FeatureMaps
from mpp.finetuning.pyramid import Pyramid

PLAIN = FeatureMaps((24, 24, 24, 24), (8, 8, 8, 8))
STAGES = FeatureMaps((16, 24, 32, 48), (4, 8, 16, 32))


def maps_of(kind: FeatureMaps, size: tuple[int, int] = (64, 96)) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, d, size[0] // s, size[1] // s, generator=rng, requires_grad=True)
        for d, s in zip(*kind, strict=True)
    ]


@pytest.mark.parametrize(
    ("finest", "strides"), [(4, [2, 4, 8, 16]), (2, [4, 8, 16]), (1, [8, 16])]
)  # fmt: skip
@pytest.mark.parametrize("last_only", [False, True])
def test_over_a_plain_encoder(finest: int, strides: list[int], last_only: bool) -> None:
    pyramid = Pyramid(PLAIN, 20, finest=finest, last_only=last_only)
    assert pyramid.strides == strides
    maps = maps_of(PLAIN)
    levels = pyramid(maps)
    assert [tuple(level.shape) for level in levels] == [(2, 20, 64 // s, 96 // s) for s in strides]
    torch.stack([level.square().sum() for level in levels]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pyramid.parameters())
    read = [m.grad is not None for m in maps]
    assert read[-1], "the last block must always be read, or its weights would have no gradient"
    assert sum(read) == (1 if last_only else min(len(strides), 4))


def test_over_stages_coarse_levels_reach_the_finer_ones() -> None:
    pyramid = Pyramid(STAGES, 20, finest=4, last_only=True)
    assert pyramid.strides == [4, 8, 16, 32]
    maps = maps_of(STAGES)
    levels = pyramid(maps)
    assert [tuple(level.shape[2:]) for level in levels] == [(64 // s, 96 // s) for s in STAGES.strides]
    levels[0].square().sum().backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in maps)


def test_an_odd_number_of_cells_has_a_coarser_level_too() -> None:
    pyramid = Pyramid(PLAIN, 20, finest=1, last_only=True)
    assert [tuple(level.shape[2:]) for level in pyramid(maps_of(PLAIN, (8, 24)))] == [(1, 3), (1, 2)]
