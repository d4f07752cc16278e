"""Monitor a pretraining run: an online probe of the encoder, and the spread of its features."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from mpp.data.labeled import Labeled
from mpp.data.labeled_sets import CentreDataset
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError
from mpp.evaluation.features import EncoderReader, Place
from mpp.evaluation.probes import linear
from mpp.evaluation.rank import effective_rank, image_share
from mpp.recipe.sections import Decoding
from mpp.rng import Purpose, stream
from mpp.training.batch_norms import batch_norms_of, choose_batches, measure_batch_norms, restore_statistics

BATCH = 256
MAX_ITERATIONS = 50
"""Most iterations of L-BFGS, which bounds the cost of the probe (a guess)."""
LEAST_MARGIN = 0.02
"""Least loss of accuracy for a warning, compared with the weights that training started from (a guess)."""


@dataclass
class ProbeImages:
    """Labeled training or validation images of the probe, in memory."""

    images: Tensor
    """(n, C, H, W) uint8 images."""
    labels: np.ndarray
    """(n,) int64 class numbers."""


def probe_images(
    data: Labeled, size: tuple[int, int], most: int, seed: int, key: str, **reading: Unpack[Decoding]
) -> ProbeImages:
    """Read images for the probe, centre-cropped.

    Args:
        data: Labeled images.
        size: (H, W) of the crops in pixels.
        most: Most images, drawn by the seed.
        seed: Seed of the run.
        key: Recipe key of the images, for messages.
        **reading: How images are decoded; see `Decoding`.

    Raises:
        UserError: If no image can be read.
    """
    numbers = np.sort(stream(seed, Purpose.PROBE).permutation(len(data.labels))[:most])
    batch = CentreDataset(data, size, 1.0, **reading).__getitems__(numbers.tolist())
    if isinstance(batch, UserError):
        raise batch
    readable = batch.readable
    if not readable.any():
        raise UserError(f"{key}: not one image can be read")
    return ProbeImages(batch.images[readable], batch.labels[readable].numpy())


class Probed(NamedTuple):
    accuracy: float
    layer: int
    seconds: float


class OnlineProbe:
    """A linear probe of every layer's mean patch token, on a fixed small set of labeled images.

    The probe does not change training: it draws no random numbers, and no gradient flows. The best layer is chosen on
    the same images that the probe is judged on. So the probe is a monitor; `mpp evaluate` gives evidence.

    Args:
        train: Images to fit the probe on.
        val: Images to judge the probe by.
        num_classes: Number of classes.
        weight_decay: Weight decay of the probe.
        mean: (C, 1, 1) mean of each channel, for pixels in [0, 1].
        std: (C, 1, 1) standard deviation of each channel, for pixels in [0, 1].
    """

    def __init__(
        self, train: ProbeImages, val: ProbeImages, num_classes: int, weight_decay: float, mean: Tensor, std: Tensor
    ) -> None:
        self.train, self.val, self.num_classes, self.weight_decay = train, val, num_classes, weight_decay
        self.mean, self.std = mean.flatten().tolist(), std.flatten().tolist()

    @property
    def fingerprint(self) -> str:
        """Return a fingerprint of all that the probe's accuracy depends on, except the encoder."""
        digest = hashlib.sha256(str(self.weight_decay).encode())
        for side in (self.train, self.val):
            digest.update(side.images.numpy().tobytes())
            digest.update(side.labels.tobytes())
        return digest.hexdigest()

    def margin(self, accuracy: float) -> float:
        """Return the loss of accuracy that is more than noise: two standard errors, at least `LEAST_MARGIN`."""
        return max(LEAST_MARGIN, 2 * math.sqrt(accuracy * (1 - accuracy) / len(self.val.labels)))

    def __call__(self, model: nn.Module, device: torch.device) -> Probed:
        """Probe the encoder with its current weights.

        For the probe, batch norms use statistics of the probe's whole training images, as the exported encoder has
        statistics of whole images. Then their own statistics, which come from partly hidden images, are restored.

        Args:
            model: A timm encoder, in eval mode.
            device: Device on which features are computed.
        """
        began = time.monotonic()
        reader = EncoderReader(model, None, self.mean, self.std).to(device)
        norms, images = batch_norms_of(model), self.train.images
        batches = (images[rows].to(device) for rows in choose_batches(range(len(images))))
        with restore_statistics(norms):
            measure_batch_norms(reader, norms, batches)
            train, val = (self._features(reader, side.images, device) for side in (self.train, self.val))
        accuracy_of = {}
        for layer in reader.layers:
            x, y = train[str(layer)], val[str(layer)]
            fitted = linear.fit(
                x, self.train.labels, self.num_classes, self.weight_decay, device=device, max_iterations=MAX_ITERATIONS
            )
            accuracy_of[layer] = float((fitted.predict(y) == self.val.labels).mean())
        best = max(accuracy_of, key=lambda layer: (accuracy_of[layer], -layer))
        return Probed(accuracy_of[best], best, time.monotonic() - began)

    @staticmethod
    def _features(reader: EncoderReader, images: Tensor, device: torch.device) -> dict[str, np.ndarray]:
        parts_of: dict[str, list[Tensor]] = {str(layer): [] for layer in reader.layers}
        for start in range(0, len(images), BATCH):
            pooled = reader(images[start : start + BATCH].to(device)).pooled
            for layer, parts in parts_of.items():
                parts.append(pooled[Place(layer, "mean")].cpu())
        return {layer: torch.cat(parts).numpy() for layer, parts in parts_of.items()}


class Spread(NamedTuple):
    """The spread of an encoder's features over images. An image's features are the last block's mean patch token."""

    rank: float
    """Effective rank of the features over the images, after subtracting their mean."""
    share: float
    """Share of the features' energy that depends on the image."""


@torch.no_grad()
def spread(model: nn.Module, images: Tensor) -> Spread:
    """Measure the spread of a timm encoder's features.

    RankMe (Garrido et al. 2023) does not centre the features. A large common part, which a following norm removes, then
    hides the other directions: the rank was 3 instead of 19 for an encoder that fine-tunes well.

    Args:
        model: A timm encoder, in eval mode.
        images: (B, C, H, W) normalised images, without masks.
    """
    maps: TimmModel = model
    feature_map = maps.forward_intermediates(images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True)[
        -1
    ]
    pooled = feature_map.float().mean((2, 3))
    return Spread(effective_rank(pooled - pooled.mean(0)), image_share(pooled.unsqueeze(1)))
