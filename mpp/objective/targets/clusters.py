"""Clusters of the features of a moving teacher, found while training (CAPI, Darcet et al. 2025)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.data.batch import Images
from mpp.objective.interfaces import TargetContext
from mpp.objective.moving_teacher import MovingTeacherTarget
from mpp.recipe.values import Bool, Fraction, PositiveFloat, PositiveInt

SINKHORN_STEPS = 3
"""Number of times that clusters and tokens are balanced (CAPI: 3)."""
LEAST_PROBABILITY = 1e-6
"""Least probability in the trivial prediction, whose logarithm is taken."""


class ClustersTarget(MovingTeacherTarget):
    """Predict to which clusters the features of a moving average of the encoder belong, which sees the whole image.

    Every cell gets a probability for each cluster: the softmax of the cosines between its feature and the clusters'
    directions, balanced by Sinkhorn-Knopp so that all clusters are equally frequent. This balance keeps the targets
    from collapsing. It is found within a micro-batch, so another division of a step into micro-batches changes a run.

    CAPI trains the directions by gradient. Here each follows the mean of the features that belong most to it, as
    codebooks do (van den Oord et al. 2017, appendix A.1).

    Args:
        clusters: Number of clusters (CAPI: 16384, for batches of 16384 images; the default is a guess).
        temperature: Divisor of the cosines (CAPI: 0.06).
        positionwise: Balance each place of the grid alone, so that a cluster cannot stand for a place (CAPI: true). It
            needs about as many images in a micro-batch as clusters.
        cluster_decay: Decay of the moving average of the clusters' directions (a guess).
        layers: Number of last blocks to average (CAPI: 1).
        decay: Decay of the moving average of the encoder at the first step (a guess).
        decay_end: Decay at the last step. The decay rises linearly in between.
    """

    of = "probabilities"

    directions: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        context: TargetContext,
        *,
        clusters: PositiveInt = 512,
        temperature: PositiveFloat = 0.06,
        positionwise: Bool = False,
        cluster_decay: Fraction = 0.9,
        layers: PositiveInt = 1,
        decay: Fraction = 0.996,
        decay_end: Fraction = 1.0,
    ) -> None:
        super().__init__(context, layers=layers, decay=decay, decay_end=decay_end)
        width = self.teacher.dim
        self.dim, self.temperature = clusters, temperature
        self.positionwise, self.cluster_decay = positionwise, cluster_decay
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
            features = F.normalize(features, dim=-1)
            scores = features @ self.directions.T / self.temperature
            by_group = scores.transpose(0, 1) if self.positionwise else scores.flatten(0, 1).unsqueeze(0)
            balanced = balance(by_group)
            probabilities = balanced.transpose(0, 1) if self.positionwise else balanced.view_as(scores)
            if self.training:
                self._collect(features.flatten(0, 1), probabilities.flatten(0, 1))
        return probabilities

    def _collect(self, features: Tensor, probabilities: Tensor) -> None:
        """Add features (n, D) to the sums of the clusters to which they belong most."""
        belongs = F.one_hot(probabilities.argmax(-1), self.dim).to(features.dtype)
        self.sums += belongs.T @ features
        self.counts += belongs.sum(0)

    def trivial(self, images: Images, hidden: Tensor) -> Tensor:
        """Return the logits of the mean probabilities of each cell over all images."""
        values = self(images)
        return values.mean(0, keepdim=True).clamp_min(LEAST_PROBABILITY).log().expand_as(values)

    @torch.no_grad()
    def after_step(self, encoder: nn.Module, step: int, total_steps: int, made: Tensor) -> None:
        """Move the copy towards the encoder, and the clusters towards the features of all processes since."""
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
    """Return probabilities such that clusters are about equally frequent in each group (Cuturi 2013).

    Args:
        scores: Scores of n tokens, (groups, n, clusters).

    Returns:
        Probabilities of the same shape, which sum to 1 for each token.
    """
    for _ in range(SINKHORN_STEPS):
        scores = scores - scores.logsumexp(1, keepdim=True)
        scores = scores - scores.logsumexp(2, keepdim=True)
    return scores.exp()
