"""Frozen encoders that see whole images: published models, exports, and copies of the encoder in training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.data.batch import Images
from mpp.encoders.adapter import TimmEncoder
from mpp.encoders.creation import create_timm_model
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line
from mpp.recipe.flat import JsonObject
from mpp.recipe.values import TimmArgs
from mpp.runs.records import timm_folder


class FrozenTeacher(nn.Module):
    """Frozen model in eval mode that returns the mean of its last `layers` blocks, without gradient.

    Before averaging, each token of each block is layer-normed without affine (data2vec, Baevski et al. 2022, section
    3.3).

    Args:
        model: timm model.
        layers: Number of last blocks to average.
        norm_average: Whether to layer-norm the average once more.
        mean: Mean of each channel that the model was trained with. None means that images are taken with the
            normalisation and size of the batch.
        std: Standard deviation of each channel that the model was trained with. None means 1.

    Raises:
        ValueError: If the model does not have `layers` last blocks of the same width and stride.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: int,
        norm_average: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.model: TimmModel = model.requires_grad_(False).eval()
        self.layers, self.norm_average = layers, norm_average
        info: Any = model.feature_info
        self.dim: int = info[-1]["num_chs"]
        self.stride: int = info[-1]["reduction"]
        if layers > len(info) or len({(i["num_chs"], i["reduction"]) for i in info[-layers:]}) > 1:
            same = [i for i in info if (i["num_chs"], i["reduction"]) == (info[-1]["num_chs"], self.stride)]
            raise ValueError(f"layers: {type(model).__name__} has {len(same)} last ones of one shape; got {layers}")
        self.own_normalisation = mean is not None
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode, whatever `mode` is: no dropout, and no updates of batch statistics."""
        return super().train(False)

    def pixels(self, images: Images, grid: tuple[int, int]) -> Tensor:
        """Return images in the model's own normalisation, resized so that they have as many cells as `grid`.

        If the model has no normalisation of its own, the normalised images of the batch are returned unchanged.
        """
        if not self.own_normalisation:
            return images.normalised
        x = (images.raw.float() / 255 - self.mean) / self.std  # type: ignore[operator]
        size = (grid[0] * self.stride, grid[1] * self.stride)
        if size != tuple(x.shape[-2:]):
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        return x

    @torch.no_grad()
    def forward(self, images: Images, grid: tuple[int, int]) -> Tensor:
        """Return features (B, gh·gw, dim) float32."""
        maps = self.model.forward_intermediates(
            self.pixels(images, grid), indices=self.layers, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        tokens = [f.float().flatten(2).transpose(1, 2) for f in maps[-self.layers :]]
        average = torch.stack([F.layer_norm(t, t.shape[-1:]) for t in tokens]).mean(0)
        return F.layer_norm(average, average.shape[-1:]) if self.norm_average else average

    def check_attention(self) -> None:
        """Check that `attention` supports the model.

        Raises:
            ValueError: If the model is not a plain ViT whose attention has a `qkv` layer.
        """
        plain = type(self.model).__name__ in ("VisionTransformer", "VisionTransformerDistilled")
        if not plain or not hasattr(getattr(self.model.blocks[-1], "attn", None), "qkv"):
            raise ValueError(
                f"teacher: attention is read from plain ViTs; got a {type(self.model).__name__} without it"
            )

    @torch.no_grad()
    def attention(self, images: Images, grid: tuple[int, int]) -> Tensor:
        """Return the attention of the class token to each cell in the last block, (B, gh·gw) float32, mean over heads.

        If the model has no class token, the attention of all tokens is averaged.

        Raises:
            ValueError: If the model is not a plain ViT.
        """
        self.check_attention()
        with torch.autocast(images.raw.device.type, enabled=False):  # masks must not depend on a run's precision
            return self._attention(images, grid)

    def _attention(self, images: Images, grid: tuple[int, int]) -> Tensor:
        caught: list[Tensor] = []
        block = self.model.blocks[-1].attn
        handle = block.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        try:
            self.model.forward_features(self.pixels(images, grid))
        finally:
            handle.remove()
        x = caught[0]
        batch, n, _ = x.shape
        q, k, _ = block.qkv(x).reshape(batch, n, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = block.q_norm(q), block.k_norm(k)
        weights = (q.float() * block.scale @ k.float().transpose(-2, -1)).softmax(-1).mean(1)
        prefix = self.model.num_prefix_tokens
        queries = weights[:, :1] if self.model.cls_token is not None else weights
        return queries.mean(1)[:, prefix:]


def frozen_teacher(
    *,
    name: str,
    pretrained: bool,
    args: TimmArgs,
    layers: int = 1,
    channels: int,
    grid: tuple[int, int],
    key: str = "target",
) -> FrozenTeacher:
    """Open a timm model by name, or the folder of a run or an export, as a teacher for a grid of cells.

    Args:
        name: Name of a timm model, or a folder.
        pretrained: Whether a timm model gets its published weights. A folder's weights are always loaded.
        args: Arguments of the model's constructor.
        layers: Number of last blocks to average.
        channels: Number of channels of the images.
        grid: Grid of cells, (rows, columns).
        key: Key of the recipe, for messages.

    Raises:
        UserError: If the name, the folder or an argument is wrong, or the teacher does not run at the grid's size.
        ValueError: If the model does not have `layers` last blocks of one shape.
    """
    if Path(name).exists():
        folder = timm_folder(name)
        if folder is None:
            raise UserError(f"{key}.teacher: {name}: no encoder in it (config.json); is the run finished?")
        name, pretrained = f"local-dir:{folder}", True  # a folder's weights are always loaded
    made: JsonObject = {"in_chans": channels, "pretrained": pretrained, "args": args}
    keys: JsonObject = {"key": f"{key}.teacher", "args_key": f"{key}.args"}
    # random numbers that the teacher draws must not change the student's initial weights
    state = torch.random.get_rng_state()
    # the size of a model's cells is known only after the model has been made
    probe: TimmModel = create_timm_model(name, image_size=None, **{**made, "pretrained": False}, **keys)
    stride = probe.feature_info[-1]["reduction"]
    size = (grid[0] * stride, grid[1] * stride)
    model: TimmModel = create_timm_model(name, image_size=size, **made, **keys)
    torch.random.set_rng_state(state)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    if len(mean) != channels:  # timm sums or repeats the first layer's weights for other channels
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    teacher = FrozenTeacher(model, layers=layers, mean=mean, std=std)
    try:
        blank = torch.zeros(1, channels, *size, dtype=torch.uint8)
        shape = tuple(teacher(Images(blank, blank.float(), blank[0].float(), blank[0].float()), grid).shape)
    except Exception as error:  # timm models raise various errors
        words = one_line(error)
        raise UserError(f"{key}.teacher: {name} does not run at {size[0]}×{size[1]} px: {words}") from error
    if shape != (1, grid[0] * grid[1], teacher.dim):
        raise UserError(
            f"{key}.teacher: {name} gives features of {shape[1:]} where {(grid[0] * grid[1], teacher.dim)} are wanted"
        )
    return teacher


def frozen_copy(encoder: TimmEncoder, *, layers: int, norm_average: bool = False) -> FrozenTeacher:
    """Copy the encoder with its current weights and its hooks. The hooks mask nothing if the model is called directly.

    Args:
        encoder: Encoder to copy.
        layers: Number of last blocks to average.
        norm_average: Whether to layer-norm the average once more.
    """
    return FrozenTeacher(copy.deepcopy(encoder.model), layers=layers, norm_average=norm_average)
