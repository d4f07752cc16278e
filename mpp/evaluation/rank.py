"""How much of a set of vectors differs between images."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def image_share(values: Tensor) -> float:
    """Part of the energy of (B, N, D) that is left without the mean of each cell over the images, in [0, 1].

    Near 0 the values hardly depend on the image, whatever their noise.
    """
    x = values.double()
    return float((x - x.mean(0)).square().sum() / x.square().sum().clamp_min(1e-300))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values of (M, D) (Roy & Vetterli 2007; RankMe, Garrido 2023).

    Not centred: values that are all the same have rank 1. nan where a value is not finite.
    """
    x = values.double()
    if not bool(x.isfinite().all()):
        return math.nan
    singular = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()  # of (D, D), however many rows there are
    share = singular / singular.sum()
    share = share[share > 0]
    return float((-(share * share.log()).sum()).exp())
