"""Attentive probe: a learned query attends to the tokens of a frozen encoder, and a linear layer classifies the result.

It is the attentive probing of CAE (Chen et al. 2022, section 4.1), without the norm and MLP of a whole block. It
measures what all tokens contain together. A linear probe of their mean measures what is left after averaging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64

Tokens = dict[str, Tensor]
"""Layer -> (B, N, D) tokens of a batch of images."""


class AttentiveProbe(nn.Module):
    """An attentive probe, from (B, N, D) tokens to (B, classes) logits.

    Args:
        dim: Width D of the tokens.
        num_classes: Number of classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        heads = next(h for h in range(max(dim // HEAD_DIM, 1), 0, -1) if dim % h == 0)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)  # layers differ in scale by orders of magnitude
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.out = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        gathered, _ = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        return self.out(gathered[:, 0])


def train(
    probes: Sequence[tuple[str, float, AttentiveProbe]],
    batches: Callable[[int], Iterable[tuple[Tokens, Tensor]]],
    *,
    epochs: int,
    steps_per_epoch: int,
    weight_decay: float,
) -> None:
    """Train several probes together, so that the encoder runs only once for each batch.

    The optimizer is AdamW. The learning rate warms up for a tenth of the steps, then follows a cosine to zero.

    Args:
        probes: (layer, learning rate, probe) of each probe.
        batches: Maps the number of an epoch to its batches of tokens and (B,) labels.
        epochs: Number of epochs.
        steps_per_epoch: Number of batches in an epoch.
        weight_decay: Weight decay of AdamW.
    """
    optimizers = [torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay) for _, lr, probe in probes]
    steps, step = epochs * steps_per_epoch, 0
    for epoch in range(epochs):
        for tokens, labels in batches(epoch):
            warmup = steps / 10
            part = (
                (step + 1) / warmup
                if step < warmup
                else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))
            )
            for (layer, lr, probe), optimizer in zip(probes, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(part, 1.0)
                loss = F.cross_entropy(probe(tokens[layer]).float(), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            step += 1


@torch.no_grad()
def count_correct(
    probes: Sequence[tuple[str, float, AttentiveProbe]], batches: Iterable[tuple[Tokens, Tensor]]
) -> tuple[list[int], int]:
    """Return the number of correct predictions of each probe, and the number of images."""
    correct, images = [0] * len(probes), 0
    for tokens, labels in batches:
        images += len(labels)
        for i, (layer, _, probe) in enumerate(probes):
            correct[i] += int((probe(tokens[layer]).argmax(-1) == labels).sum())
    return correct, images
