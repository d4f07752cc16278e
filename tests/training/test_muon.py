"""Muon agrees with timm's, which multiplies in bf16."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim.muon import zeropower_via_newtonschulz

from mpp.training.muon import ITERATIONS, Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (4, 24), (24, 4)])
@pytest.mark.parametrize("rank", [2, 4])
def test_orthogonalized_matrices_agree_with_timm(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    by_timm = zeropower_via_newtonschulz(matrix, len(ITERATIONS), ITERATIONS, dtype=torch.float32)
    torch.testing.assert_close(orthogonalize(matrix), by_timm, atol=1e-3, rtol=1e-3)
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_updates_agree_with_timm() -> None:
    """Three updates of a matrix, of a tall kernel in the layout that convolutions prefer, and of a vector."""
    changes = []
    for by_timm in (True, False):
        torch.manual_seed(0)
        matrix, kernel, vector = (torch.nn.Parameter(torch.randn(s)) for s in ((6, 9), (32, 2, 3, 3), (7,)))
        kernel.data = kernel.data.to(memory_format=torch.channels_last)
        groups = [
            {"params": [matrix, kernel], "use_muon": True, "weight_decay": 0.1},
            {"params": [vector], "use_muon": False, "weight_decay": 0.1},
        ]
        optimizer = timm.optim.Muon(groups, betas=(0.9, 0.95), eps=1e-8) if by_timm else Muon(groups, (0.9, 0.95))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        before = [p.detach().clone() for p in (matrix, kernel, vector)]
        for _ in range(3):
            for p in (matrix, kernel, vector):
                p.grad = torch.randn(p.shape)
            optimizer.step()
        changes.append([p.detach() - was for p, was in zip((matrix, kernel, vector), before, strict=True)])
    for change, change_by_timm, bound in zip(changes[1], changes[0], (0.02, 0.02, 1e-6), strict=True):
        assert (change - change_by_timm).norm() < bound * change_by_timm.norm()


def test_a_state_without_counts_is_loaded() -> None:
    """Checkpoints of earlier versions have none for the weights that Muon trains."""
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([{"params": [weight], "use_muon": True, "weight_decay": 0.0}], (0.9, 0.95))
    optimizer.state[weight] = {"momentum_buffer": torch.ones(4, 4)}
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].mean() == pytest.approx(0.95)
    assert optimizer.state[weight]["step"] == 1
