"""Measure representations and attention, as functions of tensors, each with a closed form that tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_IMAGES = 4
"""Least number of images for the unbiased estimate of CKA, whose denominators contain n - 3."""


def gram(features: Tensor) -> Tensor:
    """Compute the U-centred Gram matrix of features of n images (Székely & Rizzo 2014, section 3).

    U-centred means that the diagonal is zero and that the rows and columns sum to zero. The scalar product of two such
    matrices is n (n - 3) times the unbiased estimate of HSIC (Song et al. 2012, equation 5), which CKA requires.

    Args:
        features: (n, ...) features.

    Returns:
        (n, n) float64 matrix.

    Raises:
        ValueError: If there are fewer than `LEAST_IMAGES` images.
    """
    return grams(features.flatten(1).unsqueeze(1))[0]


def grams(features: Tensor) -> Tensor:
    """Compute the U-centred Gram matrix at each of N places, as `gram` does: (n, N, D) -> (N, n, n) float64.

    Raises:
        ValueError: If there are fewer than `LEAST_IMAGES` images.
    """
    x = features.float().transpose(0, 1)
    n = x.shape[1]
    if n < LEAST_IMAGES:
        raise ValueError(f"at least {LEAST_IMAGES} images; got {n}")
    x = x - x.mean(1, keepdim=True)  # after U-centring this only changes the rounding
    diagonal = torch.eye(n, dtype=torch.bool, device=x.device)
    k = (x @ x.transpose(1, 2)).double().masked_fill(diagonal, 0.0)
    rows, everything = k.sum(2), k.sum((1, 2))
    k = k - (rows[:, :, None] + rows[:, None, :]) / (n - 2) + everything[:, None, None] / ((n - 1) * (n - 2))
    return k.masked_fill(diagonal, 0.0)


class CkaTable:
    """Linear CKA (Kornblith et al. 2019) between two lists of representations, over minibatches of images.

    The unbiased HSIC is averaged over minibatches before it is normalised (Nguyen, Raghu & Kornblith 2021, equation 2).
    So the features of all images are never held at once, and a small number of images does not raise the values.
    """

    def __init__(self) -> None:
        self._cross: Tensor | None = None
        self._a: Tensor | None = None
        self._b: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the U-centred Gram matrices of one minibatch: (a, n, n) of the first list, (b, n, n) of the second."""
        x, y = a.flatten(1), b.flatten(1)
        sums = (x @ y.T, x.square().sum(1), y.square().sum(1))
        if self._cross is None or self._a is None or self._b is None:
            self._cross, self._a, self._b = sums
        else:
            self._cross, self._a, self._b = self._cross + sums[0], self._a + sums[1], self._b + sums[2]

    @property
    def added(self) -> bool:
        return self._cross is not None

    def values(self) -> Tensor:
        """Return CKA as (a, b) float64.

        1 means equal up to a rotation and a scale, about 0 nothing in common, nan that a representation does not vary.

        Raises:
            ValueError: If no minibatch was added.
        """
        if self._cross is None or self._a is None or self._b is None:
            raise ValueError("no minibatch was added")
        scale = (self._a[:, None] * self._b[None, :]).sqrt()
        return torch.where(scale > 0, self._cross / scale, math.nan)


def cka(a: Tensor, b: Tensor) -> float:
    """Return the unbiased linear CKA between (n, ...) and (n, ...) features."""
    table = CkaTable()
    table.add(gram(a)[None], gram(b)[None])
    return float(table.values())


def places(grid: tuple[int, int], stride_px: float) -> Tensor:
    """Return (N, 2) float: the centres of the cells of a grid in raster order, (row, column) in pixels."""
    gh, gw = grid
    rows = torch.arange(gh).repeat_interleave(gw)
    cols = torch.arange(gw).repeat(gh)
    return (torch.stack([rows, cols], 1).float() + 0.5) * stride_px


def mean_attention_distance(attention: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Compute how far a patch looks, in pixels, for each head.

    The distances to the keys are weighted by the attention and averaged over queries and images (Dosovitskiy et al.
    2021, appendix D.7). The caller leaves out class and register tokens. Rows are then scaled to a sum of 1.

    Args:
        attention: (B, heads, Nq, Nk) attention weights.
        queries: (Nq, 2) places of the queries in pixels.
        keys: (Nk, 2) places of the keys in pixels.

    Returns:
        (heads,) float64, in pixels.
    """
    distance = torch.cdist(queries.double(), keys.double()).to(attention.device)
    of_heads = []
    for weights in attention.unbind(1):  # one head at a time, since the weights are large
        rows = weights.double()
        of_heads.append(((rows * distance).sum(-1) / rows.sum(-1).clamp_min(1e-300)).mean())
    return torch.stack(of_heads)


def attention_entropy(attention: Tensor) -> Tensor:
    """Return the mean entropy of attention rows, divided by that of even attention: (B, heads, Nq, Nk) -> (heads,).

    Rows are first scaled to a sum of 1. The result is in [0, 1].
    """
    of_heads = []
    for weights in attention.unbind(1):
        rows = weights.double()
        rows = rows / rows.sum(-1, keepdim=True).clamp_min(1e-300)
        of_heads.append(torch.special.entr(rows).sum(-1).mean() / math.log(max(attention.shape[-1], 2)))
    return torch.stack(of_heads)


def rollout(attention: Sequence[Tensor]) -> Tensor:
    """Return the attention rollout through all layers: (B, heads, T, T) of each layer -> (B, T, T), rows sum to 1.

    The mean over heads is averaged with the identity, for the skip connection. The results of all layers are multiplied
    (Abnar & Zuidema 2020, section 3).
    """
    size = attention[0].shape[-1]
    identity = torch.eye(size, dtype=torch.float64, device=attention[0].device)
    through = identity.expand(len(attention[0]), -1, -1)
    for layer in attention:
        step = 0.5 * layer.double().mean(1) + 0.5 * identity
        through = (step / step.sum(-1, keepdim=True)) @ through
    return through


def cosine_map(tokens: Tensor) -> Tensor:
    """Return the cosine between each pair of N tokens, averaged over leading dimensions: (..., N, D) -> (N, N).

    A zero vector has cosine 0 with all others.
    """
    unit = F.normalize(tokens.double().flatten(0, -3) if tokens.ndim > 2 else tokens.double()[None], dim=-1)
    return (unit @ unit.transpose(-1, -2)).mean(0)


def token_similarity(tokens: Tensor) -> float:
    """Return the mean cosine between different tokens of one image, from (B, N, D). Near 1 the tokens collapsed."""
    return off_diagonal(cosine_map(tokens))


def off_diagonal(similar: Tensor) -> float:
    """Return the mean of an (N, N) matrix over all pairs of different places."""
    n = len(similar)
    return float((similar.sum() - similar.diagonal().sum()) / max(n * (n - 1), 1))


class ByDistance(NamedTuple):
    """A quantity of pairs of places, averaged over pairs at about the same distance."""

    distance_px: list[float]
    value: list[float]


def by_distance(values: Tensor, where: Tensor, step_px: float) -> ByDistance:
    """Return the mean of pairwise values in rings of distance, nearest first. Pairs of equal places are left out.

    Args:
        values: (N, N) values of pairs of places.
        where: (N, 2) places in pixels.
        step_px: Width of a ring in pixels.
    """
    distance = torch.cdist(where.double(), where.double())
    ring = (distance / step_px).round().long()
    away = ~torch.eye(len(where), dtype=torch.bool)
    counts = torch.bincount(ring[away])
    sums, radii = (torch.bincount(ring[away], v[away].double().cpu()) for v in (values, distance))
    kept = counts > 0
    return ByDistance((radii[kept] / counts[kept]).tolist(), (sums[kept] / counts[kept]).tolist())


def localised(origin: Tensor) -> float:
    """Return the fraction of tokens most similar to the input at their own place (Raghu et al. 2021, section 5).

    Args:
        origin: (N, N) CKA between the token at each place and the input at each place.
    """
    return float((origin.argmax(1) == torch.arange(len(origin), device=origin.device)).double().mean())


class Components(NamedTuple):
    """Principal components."""

    vectors: Tensor
    """(k, ...) vectors of length 1; the entry with the largest magnitude of each is positive"""
    share: Tensor
    """(k,) shares of the variance"""


def components(x: Tensor, k: int) -> Components:
    """Return the first k principal components of (n, ...), centred over n, or fewer if there are fewer."""
    flat = x.flatten(1).double()
    _, singular, vectors = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    k = min(k, len(flat) - 1, flat.shape[1])
    vectors = vectors[:k]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    variance = singular.square()
    share = variance[:k] / variance.sum().clamp_min(1e-300)
    return Components((vectors * largest.sign()).unflatten(1, x.shape[1:]), share)


def colour_maps(features: Tensor) -> tuple[Tensor, list[float]]:
    """Return the first three principal components of all cells as colours, and their shares of the variance.

    The colours are red, green and blue: (B, D, h, w) -> (B, 3, h, w) in [0, 1]. The components are those of all images
    together. The middle 98 % of each component fill the range.
    """
    cells = features.permute(0, 2, 3, 1).flatten(0, 2).double()
    principal = components(cells, 3)
    projected = (cells - cells.mean(0)) @ principal.vectors.T
    low, high = (torch.quantile(projected[:: max(len(projected) // 2**16, 1)], q, dim=0) for q in (0.01, 0.99))
    scaled = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    if scaled.shape[1] < 3:
        scaled = F.pad(scaled, (0, 3 - scaled.shape[1]), value=0.5)
    b, _, h, w = features.shape
    return scaled.float().view(b, h, w, 3).permute(0, 3, 1, 2), principal.share.tolist()


def spectrum(features: Tensor) -> Tensor:
    """Return the variances of (n, D) along the principal components, largest first, as shares of their sum."""
    x = features.double()
    variance = torch.linalg.svdvals(x - x.mean(0)).square()
    return variance / variance.sum().clamp_min(1e-300)
