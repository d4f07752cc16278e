"""Linear probe: multinomial logistic regression on standardised features, in files that need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16384
"""Most rows of a table on the device at once."""
STILL = 1e-12
"""Features whose variance over the training images is at most this are set to zero."""


def _rows(x: np.ndarray, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        yield part, torch.from_numpy(np.array(x[part], dtype=np.float32)).to(device)


@dataclass(frozen=True)
class Linear:
    """A fitted linear probe."""

    mean: Tensor
    """(D,) mean of the training features"""
    scale: Tensor
    """(D,) 1 / standard deviation of the training features; 0 for features that do not vary"""
    weight: Tensor
    """(classes, D)"""
    bias: Tensor
    """(classes,)"""

    def logits(self, x: Tensor) -> Tensor:
        """Return (B, classes) logits of (B, D) features, which are not yet standardised."""
        return (x - self.mean) * self.scale @ self.weight.T + self.bias

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the (n,) predicted class numbers of (n, D) features."""
        return np.concatenate([self.logits(rows).argmax(-1).cpu().numpy() for _, rows in _rows(x, self.mean.device)])


def standardisation(x: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation of (n, D) features, (D,) each; the latter is 0 for constant features."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(x.shape[1], dtype=dtype, device=device)
    for _, rows in _rows(x, device):
        total += rows.to(dtype).sum(0)
    mean, squares = total / len(x), torch.zeros_like(total)
    for _, rows in _rows(x, device):
        squares += (rows.to(dtype) - mean).square().sum(0)
    variance = squares / len(x)
    scale = torch.where(variance > STILL, variance.clamp_min(STILL).rsqrt(), torch.zeros_like(variance))
    return mean.float(), scale.float()


def fit(
    x: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    weight_decay: float,
    *,
    device: torch.device,
    max_iterations: int,
    start: Linear | None = None,
) -> Linear:
    """Fit a probe: minimise mean cross-entropy + weight_decay / 2 · |weight|² by L-BFGS with Wolfe line search.

    The bias is not decayed. scikit-learn's LogisticRegression is the same with C = 1 / (n · weight_decay).

    Args:
        x: (n, D) features, in memory or memory-mapped.
        labels: (n,) int64 labels.
        num_classes: Number of classes.
        weight_decay: Weight decay of the objective above.
        device: Device of the computation.
        max_iterations: Most iterations of L-BFGS.
        start: Probe fitted to the same x, whose weights are the starting point. None means zeros.
    """
    if start is None:
        mean, scale = standardisation(x, device)
        weight, bias = torch.zeros(num_classes, x.shape[1], device=device), torch.zeros(num_classes, device=device)
    else:
        mean, scale, weight, bias = start.mean, start.scale, start.weight.clone(), start.bias.clone()
    held = list(_rows(x, device)) if len(x) <= CHUNK else None  # if it fits, read once instead of at every evaluation
    targets = torch.from_numpy(labels).to(device)
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimizer.zero_grad()
        value = 0.0
        for part, rows in held or _rows(x, device):
            logits = (rows - mean) * scale @ weight.T + bias
            loss = F.cross_entropy(logits, targets[part], reduction="sum") / len(x)
            loss.backward()
            value += float(loss.detach())
        decay = weight_decay / 2 * weight.square().sum()
        decay.backward()
        return value + float(decay.detach())

    optimizer.step(objective)
    return Linear(mean, scale, weight.detach(), bias.detach())


def accuracies(
    x: np.ndarray,
    labels: np.ndarray,
    tune_x: np.ndarray,
    tune_labels: np.ndarray,
    num_classes: int,
    weight_decays: Iterable[float],
    *,
    device: torch.device,
    max_iterations: int,
) -> dict[float, float]:
    """Return weight decay -> accuracy on other features, from the strongest to the weakest weight decay.

    Each fit starts from the weights of the one before.

    Args:
        x: (n, D) features to fit to.
        labels: (n,) int64 labels of x.
        tune_x: (m, D) features to judge by.
        tune_labels: (m,) int64 labels of tune_x.
        num_classes: Number of classes.
        weight_decays: Weight decays to try, as in `fit`.
        device: Device of the computation.
        max_iterations: Most iterations of L-BFGS for each fit.
    """
    tuned: dict[float, float] = {}
    fitted = None
    for decay in sorted(weight_decays, reverse=True):
        fitted = fit(x, labels, num_classes, decay, device=device, max_iterations=max_iterations, start=fitted)
        tuned[decay] = float((fitted.predict(tune_x) == tune_labels).mean())
    return tuned
