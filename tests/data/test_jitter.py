"""Random changes of colours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mpp.data.crop import Crop
from mpp.data.jitter import jitter_colours, remove_colours
from tests.conftest import drawn_image, encoded

CROP = Crop((16, 12), 3, (0.3, 1.0), (0.75, 4 / 3), 0.5, ("JPEG", "PNG"), 10**6)


def colours(channels: int) -> Tensor:
    return torch.randint(256, (channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_transparency_stay(channels: int) -> None:
    image = colours(channels)
    changed = jitter_colours(image, np.random.default_rng(0), 0.4)
    assert changed.shape == image.shape
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed[:3], image[:3])
    grey = remove_colours(image)
    assert torch.equal(changed[3:], image[3:])
    assert torch.equal(grey[3:], image[3:])
    if channels > 1:
        assert torch.equal(grey[0], grey[1])
        assert torch.equal(grey[0], grey[2])


def test_a_crop_with_other_colours_shows_the_same_part() -> None:
    """Colours are drawn last, and each sample has its own generator."""
    data = encoded(drawn_image(0))
    plain = CROP.random(data, np.random.default_rng(5))
    jittered = replace(CROP, color_jitter=0.4).random(data, np.random.default_rng(5))
    grey = replace(CROP, grayscale=1.0).random(data, np.random.default_rng(5))
    assert torch.equal(grey, remove_colours(plain))
    assert not torch.equal(jittered, plain)
    assert torch.equal(jittered, replace(CROP, color_jitter=0.4).random(data, np.random.default_rng(5)))


def test_some_images_lose_their_colours() -> None:
    data, crop = encoded(drawn_image(0)), replace(CROP, grayscale=0.2)
    samples = [crop.random(data, np.random.default_rng(seed)) for seed in range(200)]
    lost = sum(torch.equal(s[0], s[1]) and torch.equal(s[0], s[2]) for s in samples)
    assert 20 <= lost <= 60
