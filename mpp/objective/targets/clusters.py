"""Clusters of the features of a moving teacher, found while training (CAPI, Darcet et al. 2025)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mpp.data.batch import Images
from mpp.objective.interfaces import TargetContext
from mpp.objective.moving_teacher import MovingTeacherTarget
from mpp.recipe.values import Fraction, Int, PositiveFloat, PositiveInt

Clusters = Annotated[Int, Field(ge=2)]
SINKHORN_STEPS = 3
"""Number of times that clusters and tokens are balanced (CAPI: 3)."""
LEAST_PROBABILITY = 1e-6
"""Least probability in the trivial prediction, whose logarithm is taken."""


class ClustersTarget(MovingTeacherTarget):
    """Predict to which clusters the features of a moving average of the encoder belong, which sees the whole image.

    Each cluster has a direction. Every cell gets a probability for each cluster, from the cosine between its feature
    and the direction. Sinkhorn-Knopp balances these probabilities over the tokens of a micro-batch, so that all
    clusters are about equally frequent and none takes all cells. If all features became equal, all targets would be
    uniform; `target_share` in the log shows that. Another division of a step into micro-batches changes a run.

    This differs from CAPI in two ways. CAPI trains the directions by gradient; here each one moves towards the mean of
    the features that belong most to it. CAPI balances each place of the grid alone, which takes batches of as many
    images as clusters.

    Args:
        clusters: Number of clusters (CAPI: 16384, for batches of 16384 images; the default is a guess).
        temperature: Divisor of the scores, which are cosines times the root of the features' width, as CAPI's are at
            its start (CAPI: 0.06).
        cluster_decay: Decay of the moving average of the clusters' directions (a guess).
        layers: Number of last blocks to average (CAPI: 1).
        decay: Decay of the moving average of the encoder at the first step (CAPI: 0.999).
        decay_end: Decay at the last step (CAPI: 1). The decay rises linearly in between.
    """

    of = "probabilities"
    compares_images = True

    directions: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        context: TargetContext,
        *,
        clusters: Clusters = 512,
        temperature: PositiveFloat = 0.06,
        cluster_decay: Fraction = 0.9,
        layers: PositiveInt = 1,
        decay: Fraction = 0.996,
        decay_end: Fraction = 1.0,
    ) -> None:
        super().__init__(context, layers=layers, decay=decay, decay_end=decay_end)
        width = self.teacher.dim
        self.dim, self.cluster_decay = clusters, cluster_decay
        self.sharpness = width**0.5 / temperature
        self.register_buffer("directions", F.normalize(torch.randn(clusters, width), dim=-1))
        # sums of the features of each cluster since the last step, and their number
        self.register_buffer("sums", torch.zeros(clusters, width), persistent=False)
        self.register_buffer("counts", torch.zeros(clusters), persistent=False)

    @torch.no_grad()
    def forward(self, images: Images) -> Tensor:
        """Return the probability of each cluster at every cell, (B, N, clusters) float32."""
        features = self.teacher(images, self.grid)
        # mpp plan counts operations on the meta device, which has no autocast of its own
        with torch.autocast("cpu" if features.is_meta else features.device.type, enabled=False):
            tokens = F.normalize(features, dim=-1).flatten(0, 1)
            probabilities = balance(self.sharpness * (tokens @ self.directions.T))
            if self.training:
                self._collect(tokens, probabilities)
        return probabilities.view(*features.shape[:2], self.dim)

    def _collect(self, tokens: Tensor, probabilities: Tensor) -> None:
        """Add tokens (n, D) to the sums of the clusters to which they belong most."""
        belongs = torch.zeros_like(probabilities).scatter_(1, probabilities.argmax(1, keepdim=True), 1.0)
        self.sums += belongs.T @ tokens
        self.counts += belongs.sum(0)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the logits of the mean probabilities of each cell over all images."""
        values = self(images)
        return values.mean(0, keepdim=True).clamp_min(LEAST_PROBABILITY).log().expand_as(values)

    @torch.no_grad()
    def after_step(self, encoder: nn.Module, step: int, total_steps: int, made: Tensor) -> None:
        """Move the copy towards the encoder, and the directions towards the features of the step, of all processes."""
        super().after_step(encoder, step, total_steps, made)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for of_process in (self.sums, self.counts):
                torch.distributed.all_reduce(of_process)
        means = self.sums / self.counts.clamp_min(1).unsqueeze(-1)
        moved = F.normalize(torch.lerp(means, self.directions, self.cluster_decay), dim=-1)
        used = (self.counts > 0) & made
        self.directions.copy_(torch.where(used.unsqueeze(-1), moved, self.directions))
        self.sums.zero_()
        self.counts.zero_()


def balance(scores: Tensor) -> Tensor:
    """Return probabilities (n, clusters) such that clusters are about equally frequent (Cuturi 2013).

    Args:
        scores: Scores of n tokens, (n, clusters).

    Returns:
        Probabilities, which sum to 1 for each token.
    """
    for _ in range(SINKHORN_STEPS):
        scores = scores - scores.logsumexp(0)
        scores = scores - scores.logsumexp(1, keepdim=True)
    return scores.exp()
