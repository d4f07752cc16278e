"""A moving average of weights: batch norms, and steps that are not made."""

from __future__ import annotations

import torch

from mpp.training.moving_average import average


def test_averages_of_batch_norms() -> None:
    model, averaged = (torch.nn.Sequential(torch.nn.BatchNorm1d(2)) for _ in range(2))
    torch.nn.init.constant_(model[0].weight, 3.0)
    model(torch.randn(8, 2))
    average(averaged, model, 0.75, only_if=torch.tensor(True))
    assert averaged[0].weight.tolist() == [1.5, 1.5]
    assert torch.equal(averaged[0].running_mean, model[0].running_mean)  # type: ignore[arg-type]
    average(averaged, model, 0.75, only_if=torch.tensor(False))
    assert averaged[0].weight.tolist() == [1.5, 1.5], "a skipped step must not change the average"
