"""The one adapter for timm encoders: mask tokens in, tokens of the last block out, the model never edited.

No parameter, buffer or submodule is added to the timm model, so its state dict stays native and an export is
the state as it is. Hooks do the rest:

    stem    a forward hook replaces the embedding of hidden cells by the mask token   (tokens present from the stem)
    blocks  forward pre-hooks keep visible tokens only and let mask tokens join later (dropping, late joining)

`forward_intermediates(norm=False)` reads the last block before the final norm: a head that reads the normed
tokens leaves an encoder whose probes collapse (SimMIM issue 14), and average-pooled ViTs have no norm there.
"""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from mpp.encoders.support import FAMILIES_THAT_DROP, UNREAD_PREFIXES
from mpp.errors import UserError
from mpp.patches import repeat_cells
from mpp.types import EncoderInput, EncoderOutput, gather_cells

STEMS = ("patch_embed", "stem")
"""Submodules whose output is the embedded patch map, in the order they are looked for."""


def create_timm_model(
    name: str,
    *,
    image_size: tuple[int, int],
    in_chans: int,
    pretrained: bool,
    args: dict[str, Any],
    key: str = "encoder.name",
    args_key: str = "encoder.args",
) -> nn.Module:
    """A timm model without classifier. UserError, naming the recipe's keys, for an unknown name, argument or size.

    args: timm's.
    """
    for number in ("depth", "embed_dim", "num_heads"):
        value = args.get(number, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{args_key}.{number}: must be a whole number >= 1; got {value!r}")
    patch_size = args.get("patch_size", 16)
    if not isinstance(patch_size, int) or isinstance(patch_size, bool) or patch_size < 1:
        raise UserError(f"{args_key}.patch_size: square patches, one number of pixels >= 1; got {patch_size!r}")
    if not timm.is_model(name.removeprefix("hf-hub:").split(".")[0]) and ":" not in name:
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{key}: timm {timm.__version__} has no model '{name}'.{hint}")
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=0, in_chans=in_chans, img_size=image_size, **args
        )
    except TypeError as error:
        if "img_size" in str(error):
            raise UserError(f"{key}: timm's {name} cannot be built for an image size; plain ViTs can") from error
        raise UserError(f"{args_key}: {name} does not take this: {error}") from error
    except Exception as error:  # timm, torch or the hub: ZeroDivisionError, KeyError, … by whatever argument is off
        words = " ".join(str(error).split())[:300]
        raise UserError(
            f"{key}: {name} at {image_size[0]}×{image_size[1]} px with {args}: {type(error).__name__}: {words}"
        ) from error


class TimmEncoder(nn.Module):
    """A timm model that takes `EncoderInput` and gives `EncoderOutput`.

    model: any timm encoder with a stem of STEMS, or none of the mask-token modes work (UserError).
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model: Any = model
        self.dim: int = model.num_features  # type: ignore[assignment]
        self.stride: int = model.feature_info[-1]["reduction"]  # type: ignore[index,assignment]
        self.prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)
        self.image_size = image_size
        self.family = type(model).__name__
        self.depth: int = len(model.blocks) if hasattr(model, "blocks") else 0  # type: ignore[arg-type]
        self.drops = self.family in FAMILIES_THAT_DROP
        if image_size[0] % self.stride or image_size[1] % self.stride:
            raise UserError(
                f"data.image_size: {self.family} has a stride of {self.stride} px; "
                f"got {image_size[0]}×{image_size[1]}, allowed are multiples of {self.stride}"
            )
        stem = next((s for s in STEMS if hasattr(model, s)), None)
        if stem is None:
            raise UserError(f"encoder.name: {self.family} has no stem that takes mask tokens ({', '.join(STEMS)})")
        self.stem_layout, self.stem_stride, self.stem_dim = self._probe_stem(stem)
        for name, parameter in model.named_parameters():
            if name.startswith(UNREAD_PREFIXES):
                parameter.requires_grad_(False)

        # forward() sets `_next`, the stem consumes it: a direct call of the timm model stays plain. `_now`
        # outlives forward(), so that blocks recomputed by activation checkpointing see the same mask.
        # Bound methods and partials, no lambdas: deepcopy and pickle then follow the copy.
        self._next: EncoderInput | None = None
        self._now: EncoderInput | None = None
        model.get_submodule(stem).register_forward_hook(self._at_stem)
        if self.drops:
            for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
                block.register_forward_pre_hook(partial(self._at_block, i))

    @torch.no_grad()
    def _probe_stem(self, stem: str) -> tuple[Literal["NLC", "NHWC", "NCHW"], int, int]:
        """Layout, stride and width of the stem's output, from two image widths: one shape alone is ambiguous."""
        module: Any = self.model.get_submodule(stem)
        strict, training = getattr(module, "strict_img_size", None), module.training
        parameter = next(self.model.parameters())
        shapes = []
        try:
            if strict:
                module.strict_img_size = False
            module.eval()
            for cells in (2, 3):
                size = (2 * self.stride, cells * self.stride)
                probe = torch.zeros(1, self.model.in_chans, *size, device=parameter.device, dtype=parameter.dtype)
                shapes.append(tuple(module(probe).shape))
        finally:
            module.train(training)
            if strict:
                module.strict_img_size = strict
        first, second = shapes
        if len(first) == 3:
            return "NLC", round(2 * self.stride / first[1] ** 0.5), first[2]
        if first[2] != second[2]:
            return "NHWC", 2 * self.stride // first[2], first[3]
        return "NCHW", 2 * self.stride // first[3], first[1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(gh, gw) of an image of (H, W) px."""
        return image_size[0] // self.stride, image_size[1] // self.stride

    def forward(self, x: EncoderInput) -> EncoderOutput:
        """Images with hidden cells -> tokens of the last block, see `EncoderOutput`.

        ValueError where tokens would have to be dropped and this family cannot.
        """
        dropping = x.mask_token is None or x.enter > 0
        if dropping and not self.drops:
            raise ValueError(f"{self.family} cannot run on a part of its tokens")
        self._next = x
        output_format = "NLC" if self.drops else "NCHW"
        tokens = self.model.forward_intermediates(
            x.images, indices=1, norm=False, output_fmt=output_format, intermediates_only=True
        )[-1]
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        layout: Literal["raster", "visible", "visible+predicted"] = "raster"
        if dropping:
            layout = "visible" if x.mask_token is None else "visible+predicted"
        return EncoderOutput(tokens, x.cells, layout)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def _at_stem(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        self._now, self._next = self._next, None
        now = self._now
        if now is None or now.mask_token is None or now.enter > 0:
            return None
        cells = repeat_cells(now.cells.hidden, self.stride // self.stem_stride)
        token = now.mask_token.to(out.dtype)
        if self.stem_layout == "NCHW":
            return torch.where(cells.unsqueeze(1), token.view(-1, 1, 1), out)
        return torch.where((cells.flatten(1) if self.stem_layout == "NLC" else cells).unsqueeze(-1), token, out)

    def _at_block(self, i: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        now = self._now
        if now is None or (now.mask_token is not None and now.enter == 0):
            return None
        x, rest = args[0], args[1:]
        if i == 0:
            prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
            x = torch.cat([prefix, gather_cells(patches, now.cells.visible)], 1)
        if now.mask_token is not None and i == now.enter:
            x = torch.cat([x, self._joining(now).to(x.dtype)], 1)
        return (x, *rest)

    def _joining(self, now: EncoderInput) -> Tensor:
        """(B, P, D): mask tokens as they would have looked at the input of block 0."""
        assert now.mask_token is not None
        batch, count = now.cells.predicted.shape
        tokens = now.mask_token.expand(batch, count, -1)
        positions = self.model.pos_embed
        if positions is not None:
            skip = 0 if self.model.no_embed_class else self.prefix_tokens
            tokens = tokens + gather_cells(positions[:, skip:].expand(batch, -1, -1), now.cells.predicted)
        return self.model.norm_pre(tokens)  # CLIP-style ViTs norm here, token by token; others have Identity
