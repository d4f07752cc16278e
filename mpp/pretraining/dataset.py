"""The dataset of pretraining. It reads, crops, flips and masks images as a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mpp.data.batch import Batch
from mpp.data.crop import Crop
from mpp.data.decoding.decode import GREY
from mpp.data.shards.ahead import Ahead
from mpp.data.shards.reader import ShardImages
from mpp.errors import UserError
from mpp.objective.interfaces import Mask
from mpp.objective.mask_drawing import draw_masks
from mpp.recipe.pretrain import PretrainData
from mpp.rng import Purpose, Streams, stream


def make_crop(data: PretrainData) -> Crop:
    """Return the crop that turns an image into a sample."""
    return Crop(
        data.image_size,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        color_jitter=data.color_jitter,
        grayscale=data.grayscale,
        **data.decoding(),
    )


class PretrainDataset(Dataset[Batch]):
    """Images with their masks. A key is (position, shard, row), and a list of keys gives a `Batch`.

    Args:
        images: Images of the shards. An unreadable training image is replaced by another training image, a held-out one
            by another held-out one.
        crop: Random and centre crops.
        mask: Component that draws the masks.
        mask_grid: (rows, columns) of mask units.
        seed: Seed of the run.
        train_counts: Number of training images of each shard. The images after them are held out.
        global_batch: Number of samples of one step, which all hide the same number of units.
        masks_per_image: Number of masks of each training image.
        ahead: Object that fetches remote shards in advance. None means that nothing is fetched in advance.
    """

    def __init__(
        self,
        images: ShardImages,
        crop: Crop,
        mask: Mask,
        mask_grid: tuple[int, int],
        seed: int,
        train_counts: Sequence[int] | np.ndarray,
        global_batch: int,
        masks_per_image: int = 1,
        ahead: Ahead | None = None,
    ) -> None:
        self.images, self.crop, self.mask, self.mask_grid, self.seed = images, crop, mask, mask_grid, seed
        self.train_counts, self.global_batch, self.masks_per_image = train_counts, global_batch, masks_per_image
        self.ahead = ahead

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> Batch | UserError:
        try:
            if self.ahead:
                self.ahead.come_to(keys[0][0])
            return self.batch(keys)
        except UserError as error:
            return error  # `data.loader.batches` raises it in the main process, without the worker's traceback

    def batch(self, keys: list[tuple[int, int, int]], *, centre: bool = False) -> Batch:
        """Return a batch of images with their masks.

        Args:
            keys: (position, shard, row) of each sample.
            centre: Whether images are cropped at the centre, and have one mask whose ratio is the middle of its range.
                Used for held-out images.
        """
        size = (self.crop.channels, *self.crop.size)
        images = torch.empty((len(keys), *size), dtype=self.crop.dtype)
        grey = torch.full(size, GREY, dtype=torch.uint8)
        step = keys[0][0] // self.global_batch
        draw = 0.5 if centre else stream(self.seed, Purpose.RATIO, step).random()
        positions = [position for position, _, _ in keys]
        masks = 1 if centre else self.masks_per_image
        units = draw_masks(self.mask, self.mask_grid, draw, self.seed, positions, masks)
        bad: list[str] = []
        replaced, crops = 0, Streams(self.seed, Purpose.CROP)
        for i, (position, shard, row) in enumerate(keys):

            def crop(data: bytes, position: int = position) -> Tensor:
                return self.crop.centre(data) if centre else self.crop.random(data, crops.at(position))

            last = int(self.train_counts[shard])
            rows = range(last) if row < last else range(last, self.images.counts[shard])
            images[i], passed_over = self.images.load(shard, row, rows, crop, blank=grey, few=centre)
            if i == 0 or (shard, row) != keys[i - 1][1:]:  # another view of the same image is not counted again
                bad += passed_over
                replaced += bool(passed_over)
        return Batch(
            images,
            units,
            torch.tensor(positions),
            torch.tensor([k[1:] for k in keys]),
            replaced,
            bad,
        )
