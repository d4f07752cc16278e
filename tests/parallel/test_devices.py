"""What devices are asked to do."""

from __future__ import annotations

import torch
from torch import nn

from mpp.parallel.devices import prefer_channels_last


def test_convolutional_networks_have_channels_last() -> None:
    """Those with batch norms, and of them the weights of two-dimensional convolutions alone."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv3d(1, 2, 3))
    prefer_channels_last(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[2].weight.is_contiguous()
    patches = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.LayerNorm(4))
    prefer_channels_last(patches)
    assert patches[0].weight.is_contiguous()
