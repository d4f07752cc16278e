"""The one adapter for timm encoders: mask tokens in, tokens of the last block out, the model never edited.

No parameter, buffer or submodule is added to the timm model, so its state dict stays native and an export is
the state as it is. Hooks do the rest:

    stem    a forward hook replaces the embedding of hidden cells by the mask token   (tokens present from the stem)
    blocks  forward pre-hooks keep visible tokens only and let mask tokens join later (dropping, late joining)
    embedding, last block    their forwards leave out what nothing reads (`shortcuts.py`)

Where the stem is, its layout and stride, the output's stride and which parameters the output depends on are
probed on the model itself, so that a family nobody thought of needs no entry here.

`forward_intermediates(norm=False)` reads the last block before the final norm: a head that reads the normed
tokens leaves an encoder whose probes collapse (SimMIM issue 14), and average-pooled ViTs have no norm there.
"""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from mpp.encoders.cells import Cells, Corrupted, EncoderOutput, gather_cells, repeat_cells
from mpp.encoders.maps import freeze_unread
from mpp.encoders.shortcuts import embed_at, embeds_at, run_for, runs_for
from mpp.encoders.support import FAMILIES_THAT_DROP
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, one_line
from mpp.recipe.flat import JsonObject
from mpp.recipe.values import TimmArgs

STEMS = ("patch_embed", "stem", "patch_embed.backbone", "patch_embed.backbone.stem")
"""Submodules whose output is an embedded patch map, coarsest first; the last two are inside hybrid ResNet-ViTs."""


def timm_names(pattern: str, key: str) -> list[str]:
    """timm's models that fit a name or pattern. UserError, naming the recipe's key, where none does."""
    names: list[str] = timm.list_models(pattern) if pattern else []
    if not names:
        close = difflib.get_close_matches(pattern, timm.list_models(), 3, 0.6)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        folder = "no such folder, and " if "/" in pattern else ""
        raise UserError(f"{key}: {folder}timm {timm.__version__} has no model '{pattern}'.{hint}")
    return names


def create_at_size(name: str, image_size: tuple[int, int] | None, **args: Any) -> TimmModel:
    """`timm.create_model` for an image size; families that take any size are not told it. None: the model's own."""
    try:
        return timm.create_model(name, **args, **({"img_size": image_size} if image_size else {}))  # type: ignore[arg-type]
    except TypeError as error:
        if "img_size" not in str(error) or image_size is None:
            raise
        return timm.create_model(name, **args)


def create_timm_model(
    name: str,
    *,
    image_size: tuple[int, int] | None,
    in_chans: int,
    pretrained: bool,
    args: TimmArgs,
    key: str = "encoder.name",
    args_key: str = "encoder.args",
) -> nn.Module:
    """Make a timm model without classifier.

    Args:
        name: Of timm's.
        image_size: (H, W) in pixels; None: the model's own.
        in_chans: Channels of the images.
        pretrained: Whether timm's weights are loaded.
        args: Of the model's constructor.
        key: Of the recipe that names the model, for messages.
        args_key: Of the recipe that gives `args`, for messages.

    Raises:
        UserError: An unknown name, argument or size.
    """
    for number in ("depth", "embed_dim", "num_heads"):
        value = args.get(number, 1)
        stages = value if isinstance(value, list | tuple) and value else [value]  # hierarchical families have several
        if any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in stages):
            raise UserError(f"{args_key}.{number}: must be a whole number >= 1; got {value!r}")
    patch_size = args.get("patch_size", 16)
    if not isinstance(patch_size, int) or isinstance(patch_size, bool) or patch_size < 1:
        raise UserError(f"{args_key}.patch_size: square patches, one number of pixels >= 1; got {patch_size!r}")
    if ":" not in name:
        timm_names(name.split(".")[0], key)
    for reserved in ("num_classes", "in_chans", "img_size", "pretrained", "features_only"):
        if reserved in args:
            raise UserError(
                f"{args_key}.{reserved}: is not for a recipe to set here; see data.image_size, data.channels"
            )
    for loading in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir"):
        if loading in args:  # which may open pickles
            raise UserError(f"{args_key}.{loading}: weights from elsewhere come by `mpp import`")
    for argument, value in args.items():
        if value is None:  # timm would pass over it in silence; most likely a blank is missing after a colon
            raise UserError(f"{args_key}.{argument}: has no value")
    for key_of_list, value in args.items():  # YAML has lists where timm compares with tuples
        if isinstance(value, list):
            args = {**args, key_of_list: tuple(value)}
    try:
        return create_at_size(name, image_size, pretrained=pretrained, num_classes=0, in_chans=in_chans, **args)
    except TypeError as error:
        raise UserError(f"{args_key}: {name} does not take this: {one_line(error)}") from error
    except Exception as error:  # timm, torch or the hub: ZeroDivisionError, KeyError, … by whatever argument is off
        if pretrained and _of_the_hub(error):
            raise UserError(
                f"{key}: the published weights of {name} cannot be had ({type(error).__name__}; no network?). Allowed: "
                "the folder of a run or an export where a folder is taken, or pretrained: false"
            ) from error
        words = one_line(error)
        raise UserError(
            f"{key}: {name} at {'×'.join(map(str, image_size)) + ' px' if image_size else 'its own size'} with {args}: "
            f"{type(error).__name__}: {words}"
        ) from error


def _of_the_hub(error: BaseException | None) -> bool:
    """Whether huggingface_hub or the network is behind an error."""
    while error is not None:
        if type(error).__module__.startswith(("huggingface_hub", "httpx", "urllib", "requests")):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class Stem:
    """Where mask tokens are put in."""

    path: str
    """Submodule whose output is the embedded patch map."""
    layout: Literal["NLC", "NHWC", "NCHW"]
    stride: int
    """Pixels per cell of that map."""
    dim: int


class _Call(NamedTuple):
    """What `forward` was called with."""

    x: Corrupted
    cells: Cells
    pruning: bool


class TimmEncoder(nn.Module):
    """A timm model that takes `Corrupted` images and gives `EncoderOutput`.

    unit_px: side of a mask unit, None: the encoder's stride; the stem is the coarsest whose cells fit into it.
    UserError for a model that does not give a map of features, or not at this size.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], unit_px: int | None = None) -> None:
        super().__init__()
        self.model: TimmModel = model
        self.family = type(model).__name__
        if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
            raise UserError(f"encoder.name: timm's {self.family} has no forward_intermediates: no map of features")
        info: Any = model.feature_info
        self.stride: int = info[-1]["reduction"]
        self.prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)
        """Class and register tokens, which stand before those of the patches."""
        if "return_prefix_tokens" not in inspect.signature(model.forward_intermediates).parameters:  # type: ignore[arg-type]
            self.prefix_tokens = 0  # they join after the blocks, as in CaiT
        self.image_size = image_size
        self.depth: int = len(model.blocks) if hasattr(model, "blocks") else 0  # type: ignore[arg-type]
        self.drops = self.family in FAMILIES_THAT_DROP
        if image_size[0] % self.stride or image_size[1] % self.stride:
            raise UserError(
                f"data.image_size: {self.family} has a stride of {self.stride} px; "
                f"got {image_size[0]}×{image_size[1]}, allowed are multiples of {self.stride}"
            )
        unit = unit_px or self.stride
        names = {name for name, _ in model.named_modules()}
        probed = [self._probe_stem(path) for path in STEMS if path in names]
        self.stems = [stem for stem in probed if stem is not None]
        """Every place where mask tokens could be put in, coarsest first."""
        self.stem = next((s for s in self.stems if unit % s.stride == 0), None)
        self.dim = self._freeze_unread()
        """Width of the features, which need not be that of the pooled ones: some families widen them after pooling."""

        # forward() sets `_next`, the stem consumes it: a direct call of the timm model stays plain. `_now`
        # outlives forward(), so that blocks recomputed by activation checkpointing see the same mask.
        # Bound methods and partials, no lambdas: deepcopy and pickle then follow the copy.
        self._next: _Call | None = None
        self._now: _Call | None = None
        blocks: Any = model.blocks if self.drops else []
        # probed before there are hooks, which lead to the whole model: what is probed is copied
        self.prunes = self.drops and self.stem is not None and runs_for(blocks[-1])
        """Whether the last block can be run for a part of its tokens alone."""
        embedding = model.get_submodule(self.stem.path) if self.stem is not None else nn.Identity()
        self.embeds_visible = self.drops and embeds_at(embedding, model.in_chans, image_size)  # type: ignore[arg-type]
        """Whether visible cells alone can be embedded."""
        if self.stem is not None:
            embedding.register_forward_hook(self._at_stem)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._at_block, i), with_kwargs=True)
        # in their forwards, so that whatever else is hooked to them (FSDP, checkpointing) still runs
        if self.prunes:
            blocks[-1].forward = self._last_block
        if self.embeds_visible:
            embedding.forward = self._embedding

    @torch.no_grad()
    def _probe_stem(self, path: str) -> Stem | None:
        """Layout, stride and width of a stem's output, from two image widths: one shape alone is ambiguous.

        None for a submodule that is no stem: it does not take images, or gives no map of them.
        """
        top: TimmModel = self.model.get_submodule(path.split(".")[0])
        strict, training = getattr(top, "strict_img_size", None), top.training
        parameter = next(self.model.parameters())
        shapes: list[tuple[int, ...]] = []
        handle = self.model.get_submodule(path).register_forward_hook(
            lambda module, args, out: shapes.append(tuple(_tensor_of(out).shape))
        )
        try:
            if strict:
                top.strict_img_size = False
            top.eval()
            for cells in (2, 3):
                size = (2 * self.stride, cells * self.stride)
                top(torch.zeros(1, self.model.in_chans, *size, device=parameter.device, dtype=parameter.dtype))
        except Exception:  # whatever a module raises that was never meant to be called so
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
        if (2 * self.stride) % side or other * 2 != side * 3 or (len(first) == 3 and side * side != first[1]):
            return None  # its cells do not tile the image: overlapping patches without padding
        return Stem(path, layout, 2 * self.stride // side, dim)  # type: ignore[arg-type]

    def _freeze_unread(self) -> int:
        """Width of the features; freeze what the last block does not depend on: final norms, class heads, pooling.

        Pretraining reads the last block raw. UserError where the map of features is not what the model says it is.
        """
        training = self.model.training
        parameter = next(self.model.parameters())
        blank = torch.zeros(1, self.model.in_chans, *self.image_size, device=parameter.device, dtype=parameter.dtype)
        self.model.eval()
        try:
            with torch.enable_grad():
                out = self.model.forward_intermediates(
                    blank, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
                )[-1]
        except Exception as error:  # timm's models fail in their own ways at a size or window that does not fit
            words = one_line(error)
            raise UserError(
                f"data.image_size: {self.family} does not run at {self.image_size[0]}×{self.image_size[1]} px: "
                f"{type(error).__name__}: {words}"
            ) from error
        finally:
            self.model.train(training)
        (h, w), (gh, gw) = self.image_size, self.grid(self.image_size)
        if out.ndim != 4 or tuple(out.shape[2:]) != (gh, gw):
            cells = "×".join(map(str, out.shape[2:])) or "no"
            raise UserError(
                f"encoder.name: {self.family} is not supported: at {h}×{w} px it gives {cells} cells, where its stride "
                f"of {self.stride} px makes {gh}×{gw}: they do not tile the image"
            )
        freeze_unread(self.model, [out])
        return int(out.shape[1])

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(gh, gw) of an image of (H, W) px."""
        return image_size[0] // self.stride, image_size[1] // self.stride

    def forward(self, x: Corrupted, cells: Cells, *, only_predicted: bool = False) -> EncoderOutput:
        """Encode images with hidden cells.

        Args:
            x: The images, see `Corrupted`.
            cells: Which of them are hidden, and how.
            only_predicted: Whether no tokens but the predicted cells' will be read; others are then left out where that
                is possible.

        Returns:
            Tokens of the last block, see `EncoderOutput`.

        Raises:
            ValueError: Tokens would have to be dropped, and this family cannot.
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
        self._next = None  # a model without a stem has not consumed it
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
        tokens = _tensor_of(out)
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
        if rope is not None:  # each image has rows of its own now
            rows = torch.cat([cells.visible, cells.predicted], 1) if joined else cells.visible
            # (N, K), or (heads, N, K) where every head has its own -> (B, 1 or heads, rows, K)
            rope = rope[rows].unsqueeze(1) if rope.ndim == 2 else rope[:, rows].transpose(0, 1)
            kwargs = {**kwargs, "rope": rope}
        return (tokens, *rest), kwargs

    def _embedding(self, images: Tensor, *args: object, **kwargs: object) -> Tensor:
        """In place of the stem's forward: nothing at hidden cells where their tokens are left out anyway."""
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
        """In place of the last block's forward."""
        block = self.model.blocks[-1]
        if self._now is None or not self._now.pruning:
            whole: Tensor = type(block).forward(block, tokens, *args, **kwargs)
            return whole
        x, cells, _ = self._now
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        joined = bool(x.enter)  # then the predicted ones stand last
        read = patches[:, -cells.predicted.shape[1] :] if joined else gather_cells(patches, cells.predicted)
        return run_for(block, tokens, torch.cat([prefix, read], 1))

    def _joining(self, x: Corrupted, cells: Cells) -> Tensor:
        """(B, P, D): mask tokens as they would have looked at the input of block 0."""
        assert x.mask_token is not None
        batch, count = cells.predicted.shape
        tokens = x.mask_token.expand(batch, count, -1)
        positions = self.model.pos_embed
        if positions is not None:
            skip = 0 if self.model.no_embed_class else self.prefix_tokens
            tokens = tokens + gather_cells(positions[:, skip:].expand(batch, -1, -1), cells.predicted)
        return self.model.norm_pre(tokens)  # CLIP-style ViTs norm here, token by token; others have Identity


def _tensor_of(out: Any) -> Tensor:
    """Some stems give (tokens, size)."""
    return out if isinstance(out, Tensor) else out[0]
