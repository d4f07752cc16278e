"""Agreement of the views of an image: their embeddings move together, and SIGReg keeps those of all images apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIRECTIONS = 256
"""Number of random directions on which SIGReg judges embeddings (LeJEPA: 256 to 1024 are alike)."""
POINTS = 17
"""Number of points at which two characteristic functions are compared (LeJEPA)."""
LARGEST_POINT = 5.0
"""The points are spread evenly over ± this value (LeJEPA)."""


class Agreement(nn.Module):
    """Loss on the pooled features of several views of each image (LeJEPA, Balestriero & LeCun 2025).

    A projector turns features into embeddings. The loss is their squared distance from the mean of their image, plus
    SIGReg. It has no teacher and no negative pairs.

    SIGReg judges the images of one micro-batch. So another division of a step into micro-batches changes a run.

    Args:
        encoder_dim: Width D of the encoder's tokens.
        views: Number V of views of each image. They follow each other in a batch.
        weight: Weight of the loss in the sum of all losses.
        dim: Width of the embeddings.
        hidden_dim: Width of the projector's hidden layer.
        sigreg_weight: Share of SIGReg in the loss.
    """

    points: Tensor
    point_weights: Tensor

    def __init__(
        self, encoder_dim: int, *, views: int, weight: float, dim: int, hidden_dim: int, sigreg_weight: float
    ) -> None:
        super().__init__()
        self.views, self.weight = views, weight
        self.projector = nn.Sequential(
            nn.LayerNorm(encoder_dim), nn.Linear(encoder_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim)
        )
        self.sigreg_weight = sigreg_weight
        points = torch.linspace(-LARGEST_POINT, LARGEST_POINT, POINTS)
        widths = torch.full((POINTS,), 2 * LARGEST_POINT / (POINTS - 1))
        widths[[0, -1]] /= 2  # trapezoidal rule
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("point_weights", widths * torch.exp(-(points**2) / 2), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the loss in float32.

        Args:
            features: (I, V, D), the pooled features of V views of I images.
        """
        embeddings = self.projector(features)
        # mpp plan counts operations on the meta device, which has no autocast of its own
        with torch.autocast("cpu" if embeddings.is_meta else embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            distance = (embeddings - embeddings.mean(1, keepdim=True)).square().mean()
            return (1 - self.sigreg_weight) * distance + self.sigreg_weight * self.sigreg(embeddings)

    def sigreg(self, embeddings: Tensor) -> Tensor:
        """Return how far embeddings (n, V, K) are from a standard normal distribution, as the Epps-Pulley statistic.

        It is taken over the n images for each view, and averaged over views. Views of one image resemble each other, so
        together they would not look like a sample of a normal distribution.

        The statistic compares characteristic functions on random directions, which torch's generator draws. For normal
        embeddings it is 1.06 on average, however many there are; if all n are zero it is 0.41 · n.
        """
        directions = torch.randn(embeddings.shape[-1], DIRECTIONS, device=embeddings.device)
        projected = embeddings @ (directions / directions.norm(dim=0))
        angles = projected.unsqueeze(-1) * self.points
        expected = torch.exp(-(self.points**2) / 2)
        gap = (angles.cos().mean(0) - expected).square() + angles.sin().mean(0).square()
        return len(embeddings) * (gap @ self.point_weights).mean()
