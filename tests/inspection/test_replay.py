"""Parts of a replayed batch. tests/faults/test_ranks.py replays whole steps."""

from __future__ import annotations

import torch

from mpp.inspection.replay import _alone


def rows_of(batch: dict[str, torch.Tensor], first: int, views: int) -> dict[str, list[int]]:
    return {key: rows.tolist() for key, rows in _alone(batch, first, views).items()}


def test_an_image_alone_keeps_all_of_its_masks() -> None:
    batch = {"images": torch.arange(3), "mask": torch.arange(6), "strong": torch.arange(9)}
    assert rows_of(batch, 1, views=1) == {"images": [1, 1], "mask": [2, 3, 2, 3]}


def test_an_image_alone_keeps_all_of_its_views() -> None:
    batch = {"images": torch.arange(6), "mask": torch.arange(6)}
    assert rows_of(batch, 2, views=2) == {"images": [2, 3, 2, 3], "mask": [2, 3, 2, 3]}
