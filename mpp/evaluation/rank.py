"""Measure how much a set of vectors differs between images."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def image_share(values: Tensor) -> float:
    """Return the share of the energy of (B, N, D) values that is left without each cell's mean over images, in [0, 1].

    Near 0 the values hardly depend on the image, whatever their noise.
    """
    x = values.double()
    return float((x - x.mean(0)).square().sum() / x.square().sum().clamp_min(1e-300))


def effective_rank(values: Tensor) -> float:
    """Return the effective rank of (M, D) values (Roy & Vetterli 2007; RankMe, Garrido 2023).

    It is exp of the entropy of the normalised singular values. The values are not centred, so that identical rows have
    rank 1. If any value is not finite, the rank is nan.
    """
    x = values.double()
    if not bool(x.isfinite().all()):
        return math.nan
    squares = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T  # the smaller one; both have the same eigenvalues > 0
    singular = torch.linalg.eigvalsh(squares).clamp_min(0).sqrt()
    share = singular / singular.sum()
    share = share[share > 0]
    return float((-(share * share.log()).sum()).exp())
