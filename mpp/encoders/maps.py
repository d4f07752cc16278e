"""Feature maps of a timm encoder's blocks or stages, for tasks that predict at every position of an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line

MAPS = 4
"""Largest number of maps that are read. From a plain encoder, evenly spaced blocks are read, with the last one among
them (as in BEiT's segmenter, Bao et al. 2022). From a hierarchical one, the stages with the coarsest strides are read
(FPN, Lin et al. 2017: 4 to 32 px)."""


def read_maps(model: TimmModel, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Return the raw output of some blocks, before the final norm, which belongs to the classifier.

    Args:
        model: timm model.
        x: Normalised images, (B, C, H, W).
        indices: Indices of the blocks.

    Returns:
        One map per block, (B, D_i, h_i, w_i).
    """
    return list(
        model.forward_intermediates(x, indices=list(indices), norm=False, output_fmt="NCHW", intermediates_only=True)
    )


def probe_maps(model: TimmModel, size: tuple[int, int]) -> tuple[list[int], FeatureMaps]:
    """Choose the blocks to read, and freeze the parameters that none of them depends on.

    Args:
        model: timm model.
        size: (H, W) in pixels.

    Returns:
        Indices of the blocks, and widths and strides of their maps.

    Raises:
        UserError: If the model has no maps, or its maps do not tile an image of this size.
    """
    family, info = type(model).__name__, getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or not info:
        raise UserError(f"encoder: timm's {family} has no forward_intermediates: no maps for this task")
    reductions, depth = [stage["reduction"] for stage in info], len(info)
    if len(set(reductions)) == 1:
        indices = sorted({(i + 1) * depth // MAPS - 1 for i in range(MAPS) if (i + 1) * depth >= MAPS})
    else:  # if several stages share a stride, the deepest one
        indices = [i for i, stride in enumerate(reductions) if stride not in reductions[i + 1 :]][-MAPS:]
    parameter = next(model.parameters())
    blank = torch.zeros(1, model.in_chans, *size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            maps = read_maps(model, blank, indices)
    except Exception as error:  # timm models raise various errors if a size or window does not fit
        at = f"{size[0]}×{size[1]}"
        raise UserError(f"data.image_size: {family} does not run at {at} px: {one_line(error)}") from error
    finally:
        model.train(training)
    for index, feature_map in zip(indices, maps, strict=True):
        stride = reductions[index]
        if feature_map.ndim != 4 or tuple(feature_map.shape[2:]) != (size[0] // stride, size[1] // stride):
            cells = "×".join(map(str, feature_map.shape[2:])) or "no"
            raise UserError(
                f"encoder: {family} gives {cells} cells at {size[0]}×{size[1]} px, where a stride of {stride} px makes "
                f"{size[0] // stride}×{size[1] // stride}: its maps do not tile the image"
            )
    freeze_unread(model, maps)
    return indices, FeatureMaps(tuple(m.shape[1] for m in maps), tuple(reductions[i] for i in indices))


def freeze_unread(model: nn.Module, outputs: Iterable[Tensor]) -> None:
    """Freeze the parameters that these outputs do not depend on. They are found in the autograd graph, not by name.

    They would not be trained, and DDP waits for the gradient of every trainable parameter.
    """
    read, seen, left = set(), set(), [out.grad_fn for out in outputs]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            read.add(id(node.variable))
        left.extend(following for following, _ in node.next_functions)
    for p in model.parameters():
        if id(p) not in read:
            p.requires_grad_(False)


class FeatureMaps(NamedTuple):
    """Widths and strides of the maps that an encoder returns, ordered from the first block or stage to the last."""

    dims: tuple[int, ...]
    """Width of each map."""
    strides: tuple[int, ...]
    """Pixels per cell of each map. They are all the same in plain encoders."""
