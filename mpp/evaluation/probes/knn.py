"""k-NN probe: the nearest neighbours by cosine similarity have one vote each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8192
"""Most rows of a table on the device at once."""


def nearest(train: np.ndarray, queries: np.ndarray, k: int, device: torch.device) -> np.ndarray:
    """Find the nearest neighbours by cosine similarity.

    Args:
        train: (n, D) float32 features, in memory or memory-mapped.
        queries: (q, D) float32 features, in memory or memory-mapped.
        k: Number of neighbours of each query.
        device: Device on which similarities are computed.

    Returns:
        (q, k) int64 row numbers of `train`, nearest first.
    """
    neighbours = []
    for first in range(0, len(queries), CHUNK):
        query = _directions(queries[first : first + CHUNK], device)
        best, rows = torch.empty((len(query), 0), device=device), torch.empty((len(query), 0), dtype=torch.int64)
        rows = rows.to(device)
        for start in range(0, len(train), CHUNK):
            similar = query @ _directions(train[start : start + CHUNK], device).T
            numbers = torch.arange(start, start + similar.shape[1], device=device).expand_as(similar)
            best, order = torch.cat([best, similar], 1).topk(min(k, best.shape[1] + similar.shape[1]))
            rows = torch.cat([rows, numbers], 1).gather(1, order)
        neighbours.append(rows.cpu())
    return torch.cat(neighbours).numpy()


def _directions(x: np.ndarray, device: torch.device) -> Tensor:
    return F.normalize(torch.from_numpy(np.array(x, dtype=np.float32)).to(device), dim=-1)


def vote(labels: np.ndarray, k: int, num_classes: int) -> np.ndarray:
    """Return the most frequent of the first k labels of each query; in a tie, the smallest label.

    Args:
        labels: (q, ≥ k) labels of the neighbours, nearest first.
        k: Number of neighbours that vote.
        num_classes: Number of classes.

    Returns:
        (q,) int64 predicted labels.
    """
    counts = np.zeros((len(labels), num_classes), dtype=np.int64)
    np.add.at(counts, (np.arange(len(labels))[:, None], labels[:, :k]), 1)
    return counts.argmax(1)


def accuracies(
    train: np.ndarray,
    train_labels: np.ndarray,
    queries: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int],
    num_classes: int,
    device: torch.device,
) -> dict[int, float]:
    """Return k -> accuracy for each of `ks` that is at most the number of training images.

    If all are larger, k is the number of training images.
    """
    ks = [k for k in ks if k <= len(train)] or [len(train)]
    voters = train_labels[nearest(train, queries, max(ks), device)]
    return {k: float((vote(voters, k, num_classes) == labels).mean()) for k in ks}
