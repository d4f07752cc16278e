"""Parts of a replayed batch. tests/faults/test_ranks.py replays whole steps."""

from __future__ import annotations

import torch

from mpp.inspection.replay import _alone


def test_an_image_alone_keeps_all_of_its_masks() -> None:
    batch = {"images": torch.arange(3), "mask": torch.arange(6), "strong": torch.arange(9)}
    assert {key: rows.tolist() for key, rows in _alone(batch, 1).items()} == {"images": [1], "mask": [2, 3]}
