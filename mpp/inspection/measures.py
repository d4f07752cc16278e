"""What can be measured of representations and attention: functions of tensors, each with a closed form to test by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_IMAGES = 4
"""Below, the unbiased estimate of CKA is not defined (its denominators hold n - 3)."""


def gram(features: Tensor) -> Tensor:
    """Compute the Gram matrix of features centred over n images, U-centred (Székely & Rizzo 2014, section 3).

    U-centred: zero diagonal, and rows and columns of the rest that sum to zero. The scalar product of two such matrices
    is n (n - 3) times the unbiased estimate of HSIC (Song et al. 2012, equation 5), which CKA requires.

    Returns:
        (n, n) float64, of features (n, ...).

    Raises:
        ValueError: There are fewer than `LEAST_IMAGES` images.
    """
    return grams(features.flatten(1).unsqueeze(1))[0]


def grams(features: Tensor) -> Tensor:
    """The same at each of N places: (n, N, D) -> (N, n, n)."""
    x = features.float().transpose(0, 1)
    n = x.shape[1]
    if n < LEAST_IMAGES:
        raise ValueError(f"at least {LEAST_IMAGES} images; got {n}")
    x = x - x.mean(1, keepdim=True)  # off the diagonal this changes nothing but the rounding
    diagonal = torch.eye(n, dtype=torch.bool, device=x.device)
    k = (x @ x.transpose(1, 2)).double().masked_fill(diagonal, 0.0)
    rows, everything = k.sum(2), k.sum((1, 2))
    k = k - (rows[:, :, None] + rows[:, None, :]) / (n - 2) + everything[:, None, None] / ((n - 1) * (n - 2))
    return k.masked_fill(diagonal, 0.0)


class CkaTable:
    """Linear CKA (Kornblith et al. 2019) between two lists of representations, over minibatches of images.

    The unbiased HSIC of each minibatch is averaged before it is normalised (Nguyen, Raghu & Kornblith 2021, equation
    2), so that nothing has to hold the features of all images at once, and few images are not enough to look alike.
    """

    def __init__(self) -> None:
        self._cross: Tensor | None = None
        self._a: Tensor | None = None
        self._b: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """U-centred Gram matrices of one minibatch: (a, n, n) of the one list, (b, n, n) of the other."""
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
        """(a, b) float64; 1: the same up to a rotation and a scale; about 0: nothing in common. nan: no variation."""
        if self._cross is None or self._a is None or self._b is None:
            raise ValueError("no minibatch was added")
        scale = (self._a[:, None] * self._b[None, :]).sqrt()
        return torch.where(scale > 0, self._cross / scale, math.nan)


def cka(a: Tensor, b: Tensor) -> float:
    """Linear CKA, unbiased, of (n, ...) and (n, ...)."""
    table = CkaTable()
    table.add(gram(a)[None], gram(b)[None])
    return float(table.values())


def places(grid: tuple[int, int], stride_px: float) -> Tensor:
    """(N, 2) float: the middles of the cells of a grid in raster order, (row, column) in pixels."""
    gh, gw = grid
    rows = torch.arange(gh).repeat_interleave(gw)
    cols = torch.arange(gw).repeat(gh)
    return (torch.stack([rows, cols], 1).float() + 0.5) * stride_px


def mean_attention_distance(attention: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Compute how far a patch looks, in pixels, for each head.

    The distances to the keys are weighted by the attention and averaged over queries and images (Dosovitskiy et al.
    2021, appendix D.7). Class and register tokens are to be left out before; rows are scaled to a sum of 1 here.

    Args:
        attention: (B, heads, Nq, Nk).
        queries: (Nq, 2) in pixels.
        keys: (Nk, 2) in pixels.

    Returns:
        (heads,) float64.
    """
    distance = torch.cdist(queries.double(), keys.double()).to(attention.device)
    of_heads = []
    for weights in attention.unbind(1):  # one head at a time: they are large
        rows = weights.double()
        of_heads.append(((rows * distance).sum(-1) / rows.sum(-1).clamp_min(1e-300)).mean())
    return torch.stack(of_heads)


def attention_entropy(attention: Tensor) -> Tensor:
    """(B, heads, Nq, Nk) -> (heads,) in [0, 1]: entropy of the rows, made to sum to 1, over that of even attention."""
    of_heads = []
    for weights in attention.unbind(1):
        rows = weights.double()
        rows = rows / rows.sum(-1, keepdim=True).clamp_min(1e-300)
        of_heads.append(torch.special.entr(rows).sum(-1).mean() / math.log(max(attention.shape[-1], 2)))
    return torch.stack(of_heads)


def rollout(attention: Sequence[Tensor]) -> Tensor:
    """Attention through all layers: (B, heads, T, T) of each -> (B, T, T), rows sum to 1.

    The mean of the heads, half and half with the identity for the skip connection, multiplied up (Abnar & Zuidema
    2020, section 3).
    """
    size = attention[0].shape[-1]
    identity = torch.eye(size, dtype=torch.float64, device=attention[0].device)
    through = identity.expand(len(attention[0]), -1, -1)
    for layer in attention:
        step = 0.5 * layer.double().mean(1) + 0.5 * identity
        through = (step / step.sum(-1, keepdim=True)) @ through
    return through


def cosine_map(tokens: Tensor) -> Tensor:
    """(..., N, D) -> (N, N): cosine between each two of N, averaged over what stands before. A zero has cosine 0."""
    unit = F.normalize(tokens.double().flatten(0, -3) if tokens.ndim > 2 else tokens.double()[None], dim=-1)
    return (unit @ unit.transpose(-1, -2)).mean(0)


def token_similarity(tokens: Tensor) -> float:
    """Mean cosine between different tokens of one image, (B, N, D). Near 1: all places say the same (collapse)."""
    return off_diagonal(cosine_map(tokens))


def off_diagonal(similar: Tensor) -> float:
    """(N, N) -> the mean of all pairs of different places."""
    n = len(similar)
    return float((similar.sum() - similar.diagonal().sum()) / max(n * (n - 1), 1))


class ByDistance(NamedTuple):
    """A quantity of pairs of places, averaged over pairs as far apart."""

    distance_px: list[float]
    value: list[float]


def by_distance(values: Tensor, where: Tensor, step_px: float) -> ByDistance:
    """(N, N) values of pairs and (N, 2) places in pixels -> their means in rings of `step_px`, nearest first.

    A place with itself is left out.
    """
    distance = torch.cdist(where.double(), where.double())
    ring = (distance / step_px).round().long()
    away = ~torch.eye(len(where), dtype=torch.bool)
    counts = torch.bincount(ring[away])
    sums, radii = (torch.bincount(ring[away], v[away].double().cpu()) for v in (values, distance))
    kept = counts > 0
    return ByDistance((radii[kept] / counts[kept]).tolist(), (sums[kept] / counts[kept]).tolist())


def localised(origin: Tensor) -> float:
    """(N, N) CKA between the token at each place and the input at each -> the part whose own place is the most alike.

    Whether a token still describes its own place (Raghu et al. 2021, section 5).
    """
    return float((origin.argmax(1) == torch.arange(len(origin), device=origin.device)).double().mean())


class Components(NamedTuple):
    """Principal components."""

    vectors: Tensor
    """(k, ...) of length 1; the largest entry of each is positive."""
    share: Tensor
    """(k,) of the variance"""


def components(x: Tensor, k: int) -> Components:
    """The first k principal components of (n, ...), centred over n; fewer where there are no more."""
    flat = x.flatten(1).double()
    _, singular, vectors = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    k = min(k, len(flat) - 1, flat.shape[1])
    vectors = vectors[:k]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    variance = singular.square()
    share = variance[:k] / variance.sum().clamp_min(1e-300)
    return Components((vectors * largest.sign()).unflatten(1, x.shape[1:]), share)


def colour_maps(features: Tensor) -> tuple[Tensor, list[float]]:
    """The first three principal components of all cells of all images as red, green, blue, and their shares.

    (B, D, h, w) -> (B, 3, h, w) in [0, 1], shares of the variance; the middle 98 % of each component fill the range.
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
    """(n, D) -> the variances along the principal components, largest first, as parts of their sum."""
    x = features.double()
    variance = torch.linalg.svdvals(x - x.mean(0)).square()
    return variance / variance.sum().clamp_min(1e-300)
