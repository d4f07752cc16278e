"""What a step that is left out must not leave behind."""

from __future__ import annotations

import torch
from torch import nn

from mpp.nonfinite import Statistics


def test_statistics_of_batch_norms_are_what_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 5, 5))
    before = {name: value.clone() for name, value in model.named_buffers()}
    statistics = Statistics(model, needed=True)
    statistics.remember()
    model(torch.full((2, 3, 5, 5), torch.nan))
    assert not all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    statistics.put_back()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
