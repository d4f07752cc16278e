"""Estimate memory, time and disk of a pretraining run before it starts, from the recipe's own model.

One step of one device runs on torch's meta device, which handles shapes without data. Its floating-point operations and
its peak memory in bytes are counted. The utilisation of the device (MFU) cannot be predicted: the user gives it, or it
is assumed and reported. On this machine's CPU, a few real steps and batches are timed instead.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from mpp.data.order import Order
from mpp.data.shards.reader import ShardImages, held_out_rows
from mpp.errors import UserError
from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from mpp.objective.model import MaskedPatchModel
from mpp.parallel.devices import cores
from mpp.parallel.sharding import blocks
from mpp.planning.devices import CPU, DEVICES, MFU, device_here, find_device, memory_here
from mpp.planning.memory import CUDA_KEEPS, bytes_of, count_step
from mpp.pretraining.dataset import PretrainDataset, make_crop
from mpp.recipe.flat import JsonObject
from mpp.recipe.pretrain import PretrainRecipe
from mpp.recipe.sections import Section
from mpp.training.exchange import accumulation, describe_batch
from mpp.training.optimizer import make_optimizer, pretrain_groups
from mpp.training.plan import steps_of

FP32 = 4
"""Bytes of a float32 number."""
MOMENTS = {"adamw": ("AdamW's moments", 8), "sgd": ("SGD's momentum", 4), "muon": ("Muon's state, at most", 8)}
"""Name and bytes of the optimizer state for each trained number. Muon has 4 bytes in blocks, and AdamW's elsewhere."""
TRIED_S, TRIED_IMAGES = 2.0, 64
"""Seconds for which steps are timed on this CPU, and number of images with which reading is timed."""
REST = 1.25
"""Time of a step in a run divided by the timed estimate, because batches come from other processes and records are
written: 1.23 and 1.29 in two recipes (recipes/LOG.md)."""


@dataclass(frozen=True)
class Plan:
    """An estimate of the memory, time and disk of a pretraining run."""

    encoder: str
    encoder_parameters: int
    parameters: int
    """Parameters including head, mask tokens and teachers."""
    trained: int
    flop_per_image: float
    """Operations of the forward and backward pass. A multiplication and the addition after it count as two."""
    devices: int
    device: str
    device_memory_bytes: int
    """Memory of a device, from its datasheet. For the device of this machine, its actual memory."""
    global_batch_size: int
    micro_batch: int
    """Images that a device processes at once."""
    accumulate: int
    memory_bytes: dict[str, int]
    """Memory of each device, by part."""
    host_bytes: int
    """Size of a whole copy of a sharded model, in the host memory of each process."""
    images: int
    """Training images of an epoch."""
    held_out: int
    steps: int
    epochs: float
    views: int
    """Views of each image in a step. What counts images, other than `images` and `held_out`, counts each view."""
    mfu: float
    """Fraction of the peak that the run reaches: given, assumed, or measured on this CPU."""
    peak_tflops: float
    seconds: float
    read_images_per_s: float | None
    """Images that all loader workers of this machine read per second. None unless steps were timed on this CPU and the
    data were opened."""
    checkpoint_bytes: int
    disk_bytes: int
    """Size of all checkpoints that are kept, one that is being written, and the encoder."""

    @property
    def device_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    @property
    def images_per_s(self) -> float:
        return self.steps * self.global_batch_size / self.seconds if self.seconds else 0.0

    def as_dict(self) -> JsonObject:
        return asdict(self) | {"device_bytes": self.device_bytes, "images_per_s": self.images_per_s}

    def text(self) -> str:
        """Return the plan as text for users."""
        size, total = self.device_memory_bytes, self.device_bytes
        fits = "" if total < 0.9 * size else "  more than nine tenths of what it has: " + self._advice()
        parts = "\n".join(f"  {name:<28}{bytes_of(value):>10}" for name, value in self.memory_bytes.items())
        sample = "an image" if self.views == 1 else "a view"
        batch = describe_batch(self.global_batch_size, self.devices, self.accumulate, self.views)
        host = f"  {'on the host, a whole copy':<28}{bytes_of(self.host_bytes):>10}\n" if self.host_bytes else ""
        return (
            f"{self.encoder}: {self.encoder_parameters / 1e6:.1f} M parameters, "
            f"{self.parameters / 1e6:.1f} M with head and mask tokens, {self.trained / 1e6:.1f} M trained\n"
            f"{self.flop_per_image / 1e9:.2f} GFLOP {sample}, forward and backward\n"
            f"{self.images:,} images an epoch, {self.held_out:,} more held out; {self.steps:,} steps of {batch}; "
            f"{self.epochs:.1f} epochs\n"
            f"memory of each {self.device}: {bytes_of(total)} of {bytes_of(size)}{fits}\n{parts}\n{host}"
            f"time: {_duration(self.seconds)} on {self.devices} × {self.device} at {self.mfu:.0%} of "
            f"{self.peak_tflops:.3g} TFLOP/s, which is {self.images_per_s:,.0f} images/s{self._reading()}\n"
            f"disk: {bytes_of(self.disk_bytes)}, {bytes_of(self.checkpoint_bytes)} a checkpoint\n"
            f"not counted: {'' if self.device == CPU else CUDA_KEEPS}gaps between allocations"
        )

    def _reading(self) -> str:
        if self.device != CPU:
            return " to be read"
        if self.read_images_per_s is None:
            return "; reading them is not counted"
        return f", with the loader, which by itself reads {self.read_images_per_s:,.0f} images/s, on the same cores"

    def _advice(self) -> str:
        return "optim.max_batch_per_device, encoder.grad_checkpointing=true or fsdp=true make it less"


def plan(
    recipe: PretrainRecipe,
    *,
    devices: int = 1,
    device: str | None = None,
    mfu: float | None = None,
    images: int | None = None,
) -> Plan:
    """Estimate what a run of this recipe takes.

    Args:
        recipe: Recipe of the run.
        devices: Number of devices.
        device: One of DEVICES, or "cpu" for this machine. On "cpu", steps and reading are timed for some seconds, with
            the threads and workers that the run will have. None means the device of this machine.
        mfu: Fraction of the peak that the run reaches. None means MFU; on a CPU, what the timed steps reach.
        images: Number of images, including held-out ones. None means that the recipe's data are opened and counted.

    Raises:
        UserError: If the run itself would raise it, or if no plan can be made for this request.
    """
    here, device = device is None, device or device_here()
    _check_request(device, devices, mfu)
    data, optim = recipe.data, recipe.optim
    model, grid = build_model(_with_random_weights(recipe))
    opened = ShardImages(data.shards, key="data.shards", **data.opening()) if images is None else None
    images_of_shards = opened.counts if opened is not None else [images or 0]
    held_out = held_out_rows(images_of_shards, data.held_out)
    counts = [n - int(h) for n, h in zip(images_of_shards, held_out, strict=True)]
    accumulate = accumulation(optim.global_batch_size, devices, optim.max_batch_per_device, recipe.views)
    order = Order(
        counts, global_batch=optim.global_batch_size, seed=0, lanes=data.lanes, window=data.window, views=recipe.views
    )
    steps = steps_of(optim.epochs, optim.steps, order.epoch_len, optim.global_batch_size)
    micro = optim.global_batch_size // devices // accumulate

    auto = "fp32" if device == CPU else "bf16"
    precision = auto if recipe.precision == "auto" else recipe.precision
    size = _size(model, sharded=recipe.fsdp and devices > 1, averaged=bool(recipe.ema_decay))
    read_images_per_s, step_s, tflops = None, None, find_device(device).tflops[precision]
    if device == CPU and mfu is None:  # before count_step moves the model to the meta device
        read_s = _read_s(recipe, opened, grid) if opened is not None else 0.0
        step_s = _step_s(recipe, model, grid, micro, accumulate, precision)
    flop, peak = count_step(recipe, model, grid, micro, precision)
    if step_s is not None:
        mfu = flop / micro * optim.global_batch_size / step_s / (tflops * 1e12)
        read_images_per_s = max(data.workers, 1) / read_s if read_s else None
        step_s = REST * _with_loader(step_s, read_s * optim.global_batch_size, data.workers)
    elif mfu is None:
        mfu = MFU
    checkpoint = size.weights + size.averaged + MOMENTS[recipe.optim.name][1] * size.trained
    checkpoints = recipe.keep_checkpoints + 1 + (optim.schedule == "wsd")  # the newest is written before one goes
    seen = steps * optim.global_batch_size
    return Plan(
        encoder=recipe.encoder.name,
        encoder_parameters=size.encoder,
        parameters=size.parameters,
        trained=size.trained,
        flop_per_image=flop / micro,
        devices=devices,
        device=device,
        device_memory_bytes=memory_here() if here else int(find_device(device).memory_gb * 1e9),
        global_batch_size=optim.global_batch_size,
        micro_batch=micro,
        accumulate=accumulate,
        memory_bytes=_memory(recipe, size, devices, micro, peak),
        host_bytes=size.weights + size.averaged if size.sharded else 0,
        images=sum(counts),
        held_out=int(held_out.sum()),
        steps=steps,
        epochs=seen / recipe.views / max(sum(counts), 1),
        mfu=mfu,
        peak_tflops=tflops,
        seconds=steps * step_s if step_s is not None else seen * flop / micro / (devices * tflops * 1e12 * mfu),
        read_images_per_s=read_images_per_s,
        views=recipe.views,
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * checkpoints + FP32 * size.encoder,
    )


def _check_request(device: str, devices: int, mfu: float | None) -> None:
    """Raise UserError if no plan can be made for this device, number of devices or utilisation."""
    if device not in (*DEVICES, CPU):
        raise UserError(f"--device: expected one of {', '.join((*DEVICES, CPU))}; got '{device}'")
    if device == CPU and devices > 1:
        raise UserError(
            f"--devices: {devices}: steps of a CPU are timed in one process; give --device, one of {', '.join(DEVICES)}"
        )
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu: must be > 0 and <= 1; got {mfu:g}")


class _Size(NamedTuple):
    """Numbers of parameters of a model and the memory that its weights take."""

    encoder: int
    """Parameters of the encoder."""
    parameters: int
    trained: int
    weights: int
    """Bytes of weights and buffers."""
    averaged: int
    """Bytes of the moving average of the encoder's weights; 0 if the recipe has none."""
    gathered: int
    """Bytes of gathered weights while a sharded model runs."""
    sharded: bool


def _size(model: MaskedPatchModel, *, sharded: bool, averaged: bool) -> _Size:
    numbers = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.encoder.model.parameters())
    gathered = 0
    if sharded:  # a running block is gathered, the next one is being gathered, and weights outside of blocks stay so
        sizes = sorted((sum(p.numel() for p in block.parameters()) for block in blocks(model)), reverse=True)
        gathered = FP32 * (sum(sizes[:2]) + max(numbers - sum(sizes), 0))
    return _Size(
        encoder=encoder,
        parameters=numbers,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights=FP32 * numbers + sum(b.numel() * b.element_size() for b in model.buffers()),
        averaged=FP32 * encoder if averaged else 0,
        gathered=gathered,
        sharded=sharded,
    )


def _memory(recipe: PretrainRecipe, size: _Size, devices: int, micro: int, peak: int) -> dict[str, int]:
    """Return the bytes in use on a device at the peak of a step, by part.

    Args:
        recipe: Recipe of the run.
        size: Parameters and weights of the model.
        devices: Number of devices.
        micro: Images of a micro-batch.
        peak: Peak bytes of activations and gradients.
    """
    data, share = recipe.data, devices if size.sharded else 1
    moments, moment_bytes = MOMENTS[recipe.optim.name]
    memory = {
        "weights": size.weights // share + size.gathered,
        "gradients": FP32 * size.trained // share,
        moments: moment_bytes * size.trained // share,
        "activations, at worst": max(peak - FP32 * size.trained, 0),
        "images": 2 * micro * data.channels * data.image_size[0] * data.image_size[1] * (1 if data.eight_bit else 4),
    }
    if size.averaged:
        memory["averaged weights"] = size.averaged // share
    return memory | ({"gradient buffers (DDP)": FP32 * size.trained} if devices > 1 and not size.sharded else {})


def _with_random_weights(recipe: PretrainRecipe) -> PretrainRecipe:
    """Return the recipe without published weights, which a plan does not need."""

    def changed(section: Section) -> Section:
        has_weights = "pretrained" in type(section).model_fields
        return section.model_copy(update={"pretrained": False}) if has_weights else section

    extra = [part.model_copy(update={"target": changed(part.target)}) for part in recipe.extra_targets]
    parts = {key: changed(getattr(recipe, key)) for key in ("encoder", "mask", "target")}
    return recipe.model_copy(update={**parts, "extra_targets": extra})


def _step_s(
    recipe: PretrainRecipe, model: MaskedPatchModel, grid: tuple[int, int], micro: int, accumulate: int, precision: str
) -> float:
    """Return the seconds of a training step on this CPU, timed with torch's number of threads.

    If a whole micro-batch would take long, a part of it is timed.
    """
    model.train()
    groups = pretrain_groups(model, recipe.optim.weight_decay)
    optim = recipe.optim
    optimizer = make_optimizer(groups, name=optim.name, betas=optim.betas, encoder=model.encoder.model)
    dtype = torch.uint8 if recipe.data.eight_bit else torch.float32
    count, per_image = min(micro, 2 * recipe.views), list[float]()
    until = time.monotonic() + TRIED_S
    while len(per_image) < 3 or time.monotonic() < until:
        units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(count), recipe.masks_per_image)
        images = torch.zeros(count, recipe.data.channels, *recipe.data.image_size, dtype=dtype)
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            losses = model(images, units)
        losses.sum().backward()
        per_image.append((time.perf_counter() - began) / count)
        if count < micro:
            count = min(4 * count, micro, max(int(TRIED_S / 4 / per_image[-1]), count))
            count -= count % recipe.views
    began = time.perf_counter()
    optimizer.step()
    update_s = time.perf_counter() - began
    optimizer.zero_grad(set_to_none=True)
    return float(np.median(per_image[-3:])) * micro * accumulate + update_s


def _read_s(recipe: PretrainRecipe, images: ShardImages, grid: tuple[int, int]) -> float:
    """Return the seconds in which one process reads an image, crops it and draws its mask."""
    data = recipe.data
    crop = make_crop(data)
    counts = np.asarray(images.counts)
    dataset = PretrainDataset(images, crop, build_mask(recipe), grid, 0, counts, 1, recipe.masks_per_image)
    places = [(s, r) for s, n in enumerate(counts.tolist()) for r in range(min(n, TRIED_IMAGES))][:TRIED_IMAGES]
    keys = [(i, s, r) for i, (s, r) in enumerate(places)]
    dataset.batch(keys[:1])  # opens files outside of the timing
    began = time.perf_counter()
    dataset.batch(keys)
    return (time.perf_counter() - began) / len(keys)


def _with_loader(step_s: float, read_s: float, workers: int) -> float:
    """Return the seconds of a step while the loader reads the next batch on the same cores.

    Args:
        step_s: Seconds of a step without loader.
        read_s: Seconds in which one process reads the images of a step.
        workers: Number of loader processes.
    """
    if workers == 0:
        return step_s + read_s
    busy = step_s * min(torch.get_num_threads(), cores()) + read_s
    return max(step_s, read_s / workers, busy / cores())


def _duration(seconds: float) -> str:
    for unit, scale in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} seconds"
