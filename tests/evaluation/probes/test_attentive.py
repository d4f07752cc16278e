"""The attentive probe finds information that averaging loses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpp.evaluation.probes import attentive
from mpp.evaluation.probes.attentive import AttentiveProbe, Tokens

DIM, CELLS = 16, 9


def needles(epoch: int, n: int = 64) -> Iterator[tuple[Tokens, Tensor]]:
    """Yield images in which one marked token tells the class. The other tokens tell a random class and outvote it."""
    rng = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        labels = torch.randint(0, 2, (n,), generator=rng)
        said = torch.randint(0, 2, (n, CELLS), generator=rng)
        place = torch.randint(0, CELLS, (n,), generator=rng)
        said[torch.arange(n), place] = labels
        tokens = 0.1 * torch.randn(n, CELLS, DIM, generator=rng)
        tokens[..., 0] += 2.0 * said - 1
        tokens[torch.arange(n), place, 1] += 3
        yield {"1": tokens, "noise": torch.randn(n, CELLS, DIM, generator=rng)}, labels


def test_it_attends() -> None:
    torch.manual_seed(0)
    probes = [
        ("1", 3e-3, AttentiveProbe(DIM, 2)), ("noise", 3e-3, AttentiveProbe(DIM, 2)), ("1", 1e-9, AttentiveProbe(DIM, 2)),
    ]  # fmt: skip
    attentive.train(probes, needles, epochs=40, steps_per_epoch=4, weight_decay=0.01)
    correct, images = attentive.count_correct(probes, needles(1000))
    assert images == 256
    found = [c / images for c in correct]
    assert found[0] > 0.9
    assert found[1] < 0.65, "this probe reads another layer, which has no information"
    assert found[2] < 0.8, "this probe has a learning rate that is too small to learn"
    mean = torch.cat([t["1"].mean(1)[:, 0] for t, _ in needles(1000)]) > 0
    labels = torch.cat([y for _, y in needles(1000)])
    assert ((mean == labels.bool()).float().mean()) < 0.75, "the mean of the tokens must not be enough"
