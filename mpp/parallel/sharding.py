"""Sharding by FSDP2: each process holds a part of every weight, of its gradient and of its moments.

The parts are gathered block by block (PyTorch FSDP, Zhao et al. 2023). torch's `fully_shard` cuts weights along the
first dimension into equal parts; the last ones may be shorter or empty. This file adds three things:

* which modules are gathered at once
* a whole copy of the model, for evaluation and export
* the parts as rows, as checkpoints keep them
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from mpp.errors import UserError, one_line


def shard(model: nn.Module, device: torch.device, whole: tuple[nn.Module, ...] = ()) -> None:
    """Shard a model over all processes, in place. Parameters are replaced, so create the optimizer afterwards.

    The weights of a block are gathered for its own forward and backward pass. Weights outside of blocks are gathered
    for the passes of the whole model. Weights are gathered in fp32, so that a step computes the same as without
    sharding. Under autocast, autograd keeps their bf16 copies between the passes, 2 bytes for each weight, but not with
    activation checkpointing.

    Args:
        model: Model to shard.
        device: Device of the shards.
        whole: Modules that stay whole on each process, because other code reads values inside their blocks.

    Raises:
        UserError: If the model has batch norms that learn, whose statistics would differ between processes, or
            parameters that torch cannot cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, module in model.named_modules():
        learns = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and learns:
            raise UserError(f"fsdp: {name} is a batch norm; use fsdp=false with this encoder")
    for part in whole:
        part.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    aside = {p for part in whole for p in part.parameters()}
    try:
        for block in blocks(model):
            if not aside.intersection(block.parameters()):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=aside)
    except (ValueError, NotImplementedError, AssertionError) as error:  # 0 dimensions; gaps in memory; several dtypes
        raise UserError(f"fsdp: {one_line(error)}; use fsdp=false with this encoder") from error


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules in lists named `blocks` of timm and the heads, also in nested lists; inner modules first."""

    def members(listed: Iterable[nn.Module]) -> Iterator[nn.Module]:
        for module in listed:  # a ModuleList inside is never called itself, so its members are taken
            yield from members(module) if isinstance(module, nn.ModuleList) else (module,)

    block_list: list[nn.Module] = []
    for name, module in model.named_modules():
        if name.split(".")[-1] == "blocks" and isinstance(module, nn.ModuleList | nn.Sequential):
            block_list += members(module)
    return block_list[::-1]


M = TypeVar("M", bound=nn.Module)


class Whole(Generic[M]):
    """A copy of a model with all its weights on each process, for evaluation, pictures and exports.

    Create it before the model is sharded. Its weights are in the host's memory until they are needed. If the model is
    not sharded, the model itself is used.
    """

    def __init__(self, model: M, *, sharded: bool) -> None:
        self._model = model
        self._copy: M = copy.deepcopy(model).cpu() if sharded else model

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[M]:
        """Return a context with the copy on the device, with the current weights. Every process must call this."""
        if self._copy is self._model:
            yield self._model
            return
        with torch.no_grad():
            mine = dict(self._copy.state_dict(keep_vars=True))
            for name, value in self._model.state_dict().items():  # one gathered weight at a time
                mine[name].copy_(value.full_tensor() if _is_shard(value) else value)
        self._copy.to(device)
        try:
            yield self._copy
        finally:
            self._copy.cpu()


def whole_value(value: Tensor) -> Tensor:
    """Return the whole value if each process has only a part of it, such as a norm of gradients."""
    whole: Tensor = value.full_tensor() if _is_shard(value) else value  # type: ignore[attr-defined]
    return whole


def own_part(value: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, without a copy; the tensor itself if it is not sharded."""
    part: Tensor = value.to_local() if _is_shard(value) else value  # type: ignore[attr-defined]
    return part


def own_rows(value: Tensor) -> range | None:
    """Return the row numbers of `own_part`; None if the tensor is not sharded."""
    if not _is_shard(value):
        return None
    mesh = value.device_mesh  # type: ignore[attr-defined]
    each = -(-value.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * each, value.shape[0])
    return range(first, first + own_part(value).shape[0])


def like(part: Tensor, value: Tensor) -> Tensor:
    """Return this process's part as a sharded tensor with the layout of `value`."""
    from torch.distributed.tensor import DTensor

    made = DTensor
    shard: Tensor = made.from_local(
        part.to(own_part(value).device),
        value.device_mesh,  # type: ignore[attr-defined]
        value.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
    return shard


def _is_shard(value: Tensor) -> bool:
    """Return whether a tensor is a DTensor, by an attribute, so that DTensor is imported only for sharded models."""
    return hasattr(value, "device_mesh")
