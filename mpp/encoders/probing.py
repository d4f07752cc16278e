"""Probe a timm model: run it to find the properties that are needed to hide cells from it.

The properties are the places for mask tokens with their layout and stride, the stride and width of the output, and
the parts that can be computed for only some tokens. Because they are probed, new families need no entry.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpp.encoders.shortcuts import embeds_at, runs_for
from mpp.encoders.support import FAMILIES_THAT_DROP
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line

STEMS = ("patch_embed", "stem", "patch_embed.backbone", "patch_embed.backbone.stem")
"""Submodules whose output may be an embedded patch map, coarsest first. The last two are in hybrid ResNet-ViTs."""


@dataclass(frozen=True)
class Stem:
    """A place in a model where mask tokens can be put in."""

    path: str
    """Submodule whose output is the embedded patch map."""
    layout: Literal["NLC", "NHWC", "NCHW"]
    stride: int
    """Pixels per cell of that map."""
    dim: int


@dataclass(frozen=True)
class Traits:
    """Properties of a model, found by probing."""

    family: str
    """Class name of the model."""
    stride: int
    """Pixels per cell of the feature map."""
    prefix_tokens: int
    """Number of class and register tokens, which come before the patch tokens."""
    depth: int
    """Number of blocks; 0 if the model has no list of blocks."""
    drops: bool
    """Whether the model runs on a subset of its tokens."""
    stems: list[Stem]
    """All stems of the model, coarsest first."""
    stem: Stem | None
    """Coarsest stem whose cells fit into a mask unit. None if there is no such stem."""
    dim: int
    """Width of the feature map. Pooled features may be wider, because some families widen them after pooling."""
    prunes: bool
    """Whether the last block can be computed for a subset of its tokens."""
    embeds_visible: bool
    """Whether the embedding can be computed for the visible cells only."""


def probe(model: TimmModel, image_size: tuple[int, int], unit_px: int | None = None) -> tuple[Traits, Tensor]:
    """Probe a model. The model and torch's random generator are left unchanged.

    Args:
        model: timm model without hooks, because parts of it are copied.
        image_size: (H, W) in pixels.
        unit_px: Side of a mask unit in pixels. None means the model's stride.

    Returns:
        The properties of the model, and the output of the last block with its autograd graph.

    Raises:
        UserError: If the model returns no feature map, or does not run at this image size.
    """
    family = type(model).__name__
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UserError(f"encoder.name: timm's {family} has no forward_intermediates: no map of features")
    info: Any = model.feature_info
    stride: int = info[-1]["reduction"]
    if image_size[0] % stride or image_size[1] % stride:
        raise UserError(
            f"data.image_size: {family} has a stride of {stride} px; expected multiples of it, got "
            f"{image_size[0]}×{image_size[1]}"
        )
    prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)
    if "return_prefix_tokens" not in inspect.signature(model.forward_intermediates).parameters:
        prefix_tokens = 0  # these tokens join after the blocks, as in CaiT
    names = {name for name, _ in model.named_modules()}
    probed = [_probe_stem(model, path, stride) for path in STEMS if path in names]
    stems = [stem for stem in probed if stem is not None]
    stem = next((s for s in stems if (unit_px or stride) % s.stride == 0), None)
    last_block = _run_last_block(model, image_size, stride)
    drops = family in FAMILIES_THAT_DROP
    embedding = model.get_submodule(stem.path) if stem is not None else nn.Identity()
    traits = Traits(
        family=family,
        stride=stride,
        prefix_tokens=prefix_tokens,
        depth=len(model.blocks) if hasattr(model, "blocks") else 0,
        drops=drops,
        stems=stems,
        stem=stem,
        dim=int(last_block.shape[1]),
        prunes=drops and stem is not None and runs_for(model.blocks[-1]),
        embeds_visible=drops and embeds_at(embedding, model.in_chans, image_size),
    )
    return traits, last_block


@torch.no_grad()
def _probe_stem(model: TimmModel, path: str, stride: int) -> Stem | None:
    """Return layout, stride and width of a stem's output, or None if the submodule is not a stem.

    The submodule is run at two image widths, because a single output shape is ambiguous. It is not a stem if it does
    not take images or returns no map.
    """
    top: TimmModel = model.get_submodule(path.split(".")[0])
    strict, training = getattr(top, "strict_img_size", None), top.training
    parameter = next(model.parameters())
    shapes: list[tuple[int, ...]] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, out: shapes.append(tuple(tensor_of(out).shape))
    )
    try:
        if strict:
            top.strict_img_size = False
        top.eval()
        for cells in (2, 3):
            size = (2 * stride, cells * stride)
            top(torch.zeros(1, model.in_chans, *size, device=parameter.device, dtype=parameter.dtype))
    except Exception:  # a module that does not take images may raise any error
        return None
    finally:
        handle.remove()
        top.train(training)
        if strict:
            top.strict_img_size = strict
    if [len(shape) for shape in shapes] not in ([3, 3], [4, 4]):
        return None
    first, second = shapes
    if len(first) == 3:
        layout, side, other, dim = "NLC", math.isqrt(first[1]), second[1] / math.isqrt(first[1]), first[2]
    elif first[2] != second[2]:
        layout, side, other, dim = "NHWC", first[2], second[2], first[3]
    else:
        layout, side, other, dim = "NCHW", first[3], second[3], first[1]
    if (2 * stride) % side or other * 2 != side * 3 or (len(first) == 3 and side * side != first[1]):
        return None  # its cells do not tile the image: overlapping patches without padding
    return Stem(path, layout, 2 * stride // side, dim)  # type: ignore[arg-type]


def _run_last_block(model: TimmModel, image_size: tuple[int, int], stride: int) -> Tensor:
    """Return the raw output of the last block, (1, D, gh, gw), with its autograd graph.

    Raises:
        UserError: If the model does not run at this size, or the size of its map does not match its stride.
    """
    family, training = type(model).__name__, model.training
    parameter = next(model.parameters())
    blank = torch.zeros(1, model.in_chans, *image_size, device=parameter.device, dtype=parameter.dtype)
    (h, w), (gh, gw) = image_size, (image_size[0] // stride, image_size[1] // stride)
    model.eval()
    try:
        with torch.enable_grad():
            out: Tensor = model.forward_intermediates(
                blank, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
            )[-1]
    except Exception as error:  # timm models raise various errors if a size or window does not fit
        raise UserError(
            f"data.image_size: {family} does not run at {h}×{w} px: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        model.train(training)
    if out.ndim != 4 or tuple(out.shape[2:]) != (gh, gw):
        cells = "×".join(map(str, out.shape[2:])) or "no"
        raise UserError(
            f"encoder.name: {family} is not supported: at {h}×{w} px it gives {cells} cells, where its stride "
            f"of {stride} px makes {gh}×{gw}: they do not tile the image"
        )
    return out


def tensor_of(out: Any) -> Tensor:
    """Return the tensor that a stem outputs. Some stems output (tokens, size)."""
    return out if isinstance(out, Tensor) else out[0]
