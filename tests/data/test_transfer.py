"""Batches are copied to the device one batch ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mpp.data.batch import Batch, Units
from mpp.data.transfer import on_device


def batch_of(number: int) -> Batch:
    numbers = torch.tensor([number])
    return Batch(
        torch.full((1, 3, 4, 4), number, dtype=torch.uint8),
        Units(torch.full((1, 2, 2), number % 2 == 1), number, torch.full((1, 4, 2, 2), number / 10)),
        numbers,
        numbers.expand(1, 2),
    )


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)],
)
def test_the_same_batches_one_ahead(count: int, device: str) -> None:
    taken = 0

    def batches() -> Iterator[Batch]:
        nonlocal taken
        for number in range(count):
            taken += 1
            yield batch_of(number).pin_memory() if device == "cuda" else batch_of(number)

    for number, batch in enumerate(on_device(batches(), torch.device(device))):
        assert taken == min(number + 2, count)
        expected = batch_of(number)
        for name, tensor in batch.to_keep()[0].items():
            if name in ("images", "mask", "noise"):
                assert tensor.device.type == device
            assert torch.equal(tensor.cpu(), expected.to_keep()[0][name])
        assert (batch.positions.tolist(), batch.units.count) == ([number], number)
    assert taken == count


def test_an_error_of_the_loader_comes_through() -> None:
    def batches() -> Iterator[Batch]:
        yield batch_of(0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(on_device(batches(), torch.device("cpu")))
