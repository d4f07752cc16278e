"""The adapter for all timm encoders: mask tokens go in, tokens of the last block come out.

No parameter, buffer or submodule is added to the timm model. Its state dict therefore stays native and is exported
unchanged. The work is done by hooks and replaced forward methods:

    stem    a forward hook replaces the embedding of hidden cells by the mask token   (tokens present from the stem)
    blocks  forward pre-hooks keep visible tokens only and let mask tokens join later (dropping, late joining)
    embedding, last block    replaced forward methods skip tokens that nothing reads (`shortcuts.py`)

`probing.py` finds the stem, its layout and stride, and the stride of the output by running the model. New families
therefore need no entry here.

`forward_intermediates(norm=False)` reads the last block before the final norm. If a head reads the normed tokens
instead, probes of the trained encoder collapse (SimMIM issue 14). Average-pooled ViTs have no norm there.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mpp.encoders.cells import Cells, Corrupted, EncoderOutput, gather_cells, repeat_cells
from mpp.encoders.maps import freeze_unread
from mpp.encoders.probing import Traits, probe, tensor_of
from mpp.encoders.shortcuts import embed_at, run_for
from mpp.encoders.timm_model import TimmModel
from mpp.recipe.flat import JsonObject


class _Call(NamedTuple):
    """One call of `TimmEncoder.forward`, as its hooks need it."""

    x: Corrupted
    cells: Cells
    pruning: bool


def adapt(model: nn.Module, image_size: tuple[int, int], unit_px: int | None = None) -> TimmEncoder:
    """Make an encoder of a timm model, and freeze the parameters that the last block does not depend on.

    Pretraining reads the last block's raw output. Final norms, class heads and pooling would therefore never be
    trained.

    Args:
        model: timm model. Hooks are added to it.
        image_size: (H, W) in pixels.
        unit_px: Side of a mask unit in pixels. None means the model's stride.

    Raises:
        UserError: If the model returns no feature map, or does not run at this image size.
    """
    traits, last_block = probe(model, image_size, unit_px)
    freeze_unread(model, [last_block])
    return TimmEncoder(model, image_size, traits)


class TimmEncoder(nn.Module):
    """timm model that takes `Corrupted` images and returns `EncoderOutput`. Use `adapt` to make one."""

    def __init__(self, model: TimmModel, image_size: tuple[int, int], traits: Traits) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.family, self.stride, self.dim, self.depth = traits.family, traits.stride, traits.dim, traits.depth
        self.stems, self.stem, self.prefix_tokens = traits.stems, traits.stem, traits.prefix_tokens
        self.drops, self.prunes, self.embeds_visible = traits.drops, traits.prunes, traits.embeds_visible
        # forward() sets `_next` and the stem clears it, so that a direct call of the timm model stays plain. `_now`
        # outlives forward(), so that blocks recomputed by activation checkpointing see the same mask.
        self._next: _Call | None = None
        self._now: _Call | None = None
        self._hook()

    def _hook(self) -> None:
        """Register the hooks as bound methods and partials, so that a deep copy or an unpickled model uses its own.

        A lambda in a copy would still refer to the original.
        """
        embedding: TimmModel = self.model.get_submodule(self.stem.path) if self.stem is not None else nn.Identity()
        blocks: Any = self.model.blocks if self.drops else []
        if self.stem is not None:
            embedding.register_forward_hook(self._at_stem)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._at_block, i), with_kwargs=True)
        # replace only the forward methods, so that other hooks on these modules (FSDP, checkpointing) still run
        if self.prunes:
            blocks[-1].forward = self._last_block
        if self.embeds_visible:
            embedding.forward = self._embedding

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of cells (gh, gw) of an image of (H, W) px."""
        return image_size[0] // self.stride, image_size[1] // self.stride

    def forward(self, x: Corrupted, cells: Cells, *, only_predicted: bool = False) -> EncoderOutput:
        """Encode images with hidden cells.

        Args:
            x: Corrupted images, with their mask token.
            cells: Hidden, visible and predicted cells of the images.
            only_predicted: Whether only the tokens of predicted cells will be read. The others are then left out if the
                model allows it.

        Returns:
            Tokens of the last block.

        Raises:
            ValueError: If tokens must be dropped, and this family does not support that.
        """
        dropping = x.enter is None or x.enter > 0
        if dropping and not self.drops:
            raise ValueError(f"{self.family} cannot run on a part of its tokens")
        pruning = only_predicted and self.prunes and x.enter is not None and cells.some_predicted
        self._next = _Call(x, cells, pruning)
        output_format = "NLC" if self.drops else "NCHW"
        with_prefix = {"return_prefix_tokens": True} if self.prefix_tokens else {}
        tokens = self.model.forward_intermediates(
            x.images, indices=1, norm=False, output_fmt=output_format, intermediates_only=True, **with_prefix
        )[-1]
        self._next = None  # a model without a stem has not cleared it
        tokens, prefix = tokens if self.prefix_tokens else (tokens, None)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        layout: Literal["raster", "visible", "visible+predicted", "predicted"] = "raster"
        if pruning:
            layout = "predicted"
        elif dropping:
            layout = "visible" if x.mask_token is None else "visible+predicted"
        return EncoderOutput(tokens, cells, layout, prefix)

    # ---- hooks ---------------------------------------------------------------------------------------------------

    def _at_stem(self, module: nn.Module, args: Any, out: Any) -> Any:
        self._now, self._next = self._next, None
        if self._now is None:
            return None
        x = self._now.x
        if x.mask_token is None or x.replaced is None or x.enter != 0:
            return None
        assert self.stem is not None
        tokens = tensor_of(out)
        cells = repeat_cells(x.replaced, self.image_size[0] // x.replaced.shape[1] // self.stem.stride)
        token = x.mask_token.to(tokens.dtype)
        if self.stem.layout == "NCHW":
            tokens = torch.where(cells.unsqueeze(1), token.view(-1, 1, 1), tokens)
        else:
            where = cells.flatten(1) if self.stem.layout == "NLC" else cells
            tokens = torch.where(where.unsqueeze(-1), token, tokens)
        return tokens if isinstance(out, Tensor) else (tokens, *out[1:])

    def _at_block(
        self, i: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: JsonObject
    ) -> tuple[object, JsonObject] | None:
        if self._now is None or self._now.x.enter == 0:
            return None
        x, cells, _ = self._now
        tokens, rest = args[0], args[1:]
        if i == 0:
            prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
            tokens = torch.cat([prefix, gather_cells(patches, cells.visible)], 1)
        joined = x.enter is not None and i >= x.enter
        if i == x.enter:
            tokens = torch.cat([tokens, self._joining(x, cells).to(tokens.dtype)], 1)
        rope = kwargs.get("rope")
        if rope is not None:  # each image now needs the rows of its own cells
            rows = torch.cat([cells.visible, cells.predicted], 1) if joined else cells.visible
            # (N, K), or (heads, N, K) if every head has its own -> (B, 1 or heads, rows, K)
            rope = rope[rows].unsqueeze(1) if rope.ndim == 2 else rope[:, rows].transpose(0, 1)
            kwargs = {**kwargs, "rope": rope}
        return (tokens, *rest), kwargs

    def _embedding(self, images: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Replace the stem's forward: if tokens of hidden cells are dropped later, embed only the visible cells."""
        assert self.stem is not None
        embedding = self.model.get_submodule(self.stem.path)
        if self._next is None or self._next.x.enter == 0:
            whole: Tensor = type(embedding).forward(embedding, images, *args, **kwargs)
            return whole
        cells = self._next.cells
        visible = embed_at(embedding, images, cells.visible)
        tokens = visible.new_zeros(len(images), cells.hidden[0].numel(), visible.shape[2])
        tokens = tokens.scatter(1, cells.visible.unsqueeze(-1).expand_as(visible), visible)
        return tokens.unflatten(1, cells.grid) if self.stem.layout == "NHWC" else tokens

    def _last_block(self, tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Replace the last block's forward: if no other tokens are read, compute only prefix and predicted tokens."""
        block = self.model.blocks[-1]
        if self._now is None or not self._now.pruning:
            whole: Tensor = type(block).forward(block, tokens, *args, **kwargs)
            return whole
        x, cells, _ = self._now
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        joined = bool(x.enter)  # then the predicted tokens come last
        read = patches[:, -cells.predicted.shape[1] :] if joined else gather_cells(patches, cells.predicted)
        return run_for(block, tokens, torch.cat([prefix, read], 1))

    def _joining(self, x: Corrupted, cells: Cells) -> Tensor:
        """Return mask tokens (B, P, D) with positions, as they would be at the input of block 0."""
        assert x.mask_token is not None
        batch, count = cells.predicted.shape
        tokens = x.mask_token.expand(batch, count, -1)
        positions = self.model.pos_embed
        if positions is not None:
            skip = 0 if self.model.no_embed_class else self.prefix_tokens
            tokens = tokens + gather_cells(positions[:, skip:].expand(batch, -1, -1), cells.predicted)
        return self.model.norm_pre(tokens)  # CLIP-style ViTs norm each token here; others have Identity
