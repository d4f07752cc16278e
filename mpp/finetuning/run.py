"""Fine-tuning on labeled images, beside the same fine-tune from scratch: the loop, from top to bottom.

A cell is one arm (pretrained or scratch) with one seed. Each has a folder of its own with checkpoints, so a run
killed anywhere goes on in the cell where it was.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import nn

from mpp.data.boxes import open_detected
from mpp.data.crop import Crop
from mpp.data.dense_sets import DenseDataset, WholeDataset, fit_inside, fit_shorter_side, scaled_to
from mpp.data.labeled import Labeled, open_labeled
from mpp.data.labeled_sets import CentreDataset, LabeledDataset
from mpp.data.leak import Leak, leak
from mpp.data.loader import batches
from mpp.data.masks import open_segmented
from mpp.data.order import MicroBatches, Order
from mpp.data.places import Detected, Segmented
from mpp.data.readers import PackedReader
from mpp.data.shards.reader import ShardImages
from mpp.data.shards.remote import is_remote
from mpp.data.subsets import balanced, split
from mpp.data.unreadable import check_images, count_unreadable, unread_classes
from mpp.drawing.overlays import LEAST_SCORE, over_boxes, over_pixels, show
from mpp.drawing.plots import Line, draw
from mpp.encoders.images_of import normalised_as
from mpp.encoders.sources import check_source, fingerprint_of_inputs
from mpp.errors import MppWarning, UserError, one_line
from mpp.finetuning import lora
from mpp.finetuning.distillation import Distillation, open_teacher
from mpp.finetuning.model import Dense, Supervised, build, over_views, save
from mpp.parallel import faults
from mpp.parallel.devices import cores_in_use
from mpp.parallel.liveness import SAVING, Watch
from mpp.parallel.signals import StopRequest
from mpp.parallel.team import gather_objects, on_main, start_accelerator, sum_over_processes
from mpp.recipe import registry
from mpp.recipe.dump import settings_of
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import load_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.rng import Purpose, torch_seed
from mpp.runs import checkpoint
from mpp.runs.environment import environment
from mpp.runs.folder import DATA, opened
from mpp.runs.log import RunLog
from mpp.runs.records import write_json, write_status
from mpp.runs.trackers import Trackers
from mpp.runs.verdict import Estimate, Verdict, name_unread, table
from mpp.training import nonfinite
from mpp.training.exchange import accumulation
from mpp.training.optimizer import adamw, finetune_groups, learning, scheduled_lr, set_lr, steps_of, unfreeze

RESULT = "result.json"
PLOT = "label_efficiency.png"
PICTURES = "predictions.png"
SHOWN = 8
"""Validation images in it."""
EVALUATION_BATCH = 256
"""Images that are judged at once, unless optim.max_batch_per_device is less."""
WHOLE_IMAGES = 32
"""The same of whole images, which are larger than crops."""


Images = Labeled | Segmented | Detected


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` returns."""

    out: Path
    state: str
    """"finished", or "stopped" by a signal."""
    verdicts: tuple[Verdict, ...]
    """One for each number of labels, from few to many; none where it was stopped."""
    encoder: Path | None
    """The fine-tuned model of the first arm's first seed, with most labels, as a timm folder."""
    plot: Path | None = None
    """Accuracy against labels, where there are several numbers of them."""
    signal: str | None = None
    """The name of the signal that stopped the run."""
    unread_classes: tuple[str, ...] = ()
    """Classes of the validation images of which not one could be read."""

    @property
    def score(self) -> dict[str, Estimate]:
        """Arm -> the task's headline metric (accuracy; mean average precision of several labels), with most labels."""
        return self.verdicts[-1].score if self.verdicts else {}

    @property
    def gain(self) -> Estimate | None:
        """pretrained - scratch, paired by seed, with most labels; None where one of them is missing."""
        return self.verdicts[-1].gain if self.verdicts else None

    def table(self) -> str:
        """For people."""
        found = table(self.verdicts)
        return f"{found}\n{name_unread(self.unread_classes)}" if self.unread_classes else found


@dataclass(frozen=True)
class Cell:
    """One arm with one seed and one number of labels."""

    folder: Path
    arm: str
    seed: int
    labels_per_class: int | None


@dataclass(frozen=True)
class _Control:
    """What the cells of a run share."""

    stop_request: StopRequest
    watch: Watch
    status: Callable[..., None]
    """Writes the run's status.json; a cell has one of its own, too."""
    until_the_end: ExitStack


def finetune(recipe: FinetuneRecipe, resume: str = "never") -> FinetuneResult:
    """Run a recipe. resume: "never" (the run folder must be new) or "auto".

    UserError for everything the user can correct.
    """
    if resume not in ("never", "auto"):
        raise UserError(f"--resume {resume}: fine-tuning has a checkpoint for each cell; allowed: auto, never")
    with ExitStack() as until_the_end:
        return _finetune(recipe, resume, until_the_end)


def _finetune(recipe: FinetuneRecipe, resume: str, until_the_end: ExitStack) -> FinetuneResult:
    accelerator = start_accelerator(recipe.precision, recipe.trackers, recipe.hang_timeout_s)
    rank, world, out = accelerator.process_index, accelerator.num_processes, Path(recipe.out)
    stop_request = until_the_end.enter_context(StopRequest())
    watch = until_the_end.enter_context(Watch(rank, world, out, hang_timeout_s=recipe.hang_timeout_s))
    check_source(recipe.encoder, key="encoder", more=("scratch",))
    data = normalised_as(recipe.encoder, recipe.data, warn=accelerator.is_main_process)
    recipe = recipe.model_copy(update={"data": data})
    train = _open(recipe, "train", None)
    val = _open(recipe, "val", train.classes)
    arms = _arms(recipe)
    _check(recipe, accelerator, arms, train, val)
    doubts = on_main(accelerator, partial(_doubts, recipe, train, val))
    fingerprint = _fingerprint(recipe, train, val)
    until_the_end.enter_context(opened(accelerator, recipe, resume, fingerprint=fingerprint))

    def status(state: str, **more: Any) -> None:
        if accelerator.is_main_process:
            write_status(out, state, **more)

    watch.status = status
    watch.at(0, "loading")
    if accelerator.is_main_process:
        write_json(out / "env.json", environment())
        write_status(out, "running")
        _record_data(recipe, train, val, fingerprint)
        if taken := cores_in_use(accelerator):
            warnings.warn(taken, MppWarning, stacklevel=2)
        for doubt in doubts:
            warnings.warn(doubt, MppWarning, stacklevel=2)

    cells = _cells(recipe, arms)
    measured: dict[Cell, dict[str, float]] = {}
    stop_request.listen()
    control = _Control(stop_request, watch, status, until_the_end)
    for number, cell in enumerate(cells):
        metrics = on_main(accelerator, partial(_finished, cell.folder, fingerprint))
        if metrics is None:
            status("running", cell=cell.folder.name)
            if accelerator.is_main_process:
                print(f"cell {number + 1} of {len(cells)}: {cell.folder.name}", flush=True)
            metrics = _run_cell(recipe, accelerator, cell, train, val, fingerprint, control)
            watch.status = status
            (stopping,) = sum_over_processes(accelerator, [bool(stop_request)])
            if metrics is None or (stopping and number < len(cells) - 1):
                why = stop_request.by or "a signal to another process"
                status("stopped", cell=cell.folder.name, why=why)
                return FinetuneResult(out, "stopped", (), None, signal=stop_request.of_all(accelerator))
        measured[cell] = metrics

    verdicts = []
    for count in recipe.data.label_counts():
        of_arm = {arm: [m for c, m in measured.items() if (c.labels_per_class, c.arm) == (count, arm)] for arm in arms}
        verdicts.append(Verdict.of(count, of_arm, _task(recipe).headline))
    most = next(c for c in cells if c.labels_per_class == verdicts[-1].labels_per_class)
    plot = out / PLOT if len(verdicts) > 1 else None
    unread = on_main(accelerator, partial(_unread_classes, most.folder))
    result = FinetuneResult(out, "finished", tuple(verdicts), most.folder / "encoder", plot, unread_classes=unread)
    if accelerator.is_main_process:
        if plot:
            _plot(result, plot)
        write_json(
            out / RESULT,
            {
                "metric": verdicts[-1].metric,
                "score": {arm: asdict(e) for arm, e in result.score.items()},
                "gain": asdict(result.gain) if result.gain else None,
                "verdicts": [asdict(v) for v in verdicts],
                "seeds": list(recipe.seeds),
                "val_images": len(val),
                "unread_classes": list(unread),
                "encoder": str(result.encoder),
            },
        )
    status("finished")
    return result


def _record_data(recipe: FinetuneRecipe, train: Images, val: Images, fingerprint: str) -> None:
    """data.json: how many images, and which of those that judge were trained on; a warning where any were."""
    path = Path(recipe.out) / DATA
    try:
        if json.loads(path.read_text())["fingerprint"] == fingerprint:
            return  # a resumed run
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = leak(val.reader, train.reader)
    if train.fingerprint() == val.fingerprint():
        warnings.warn("data.val: the same images as data.train; the accuracy says nothing", MppWarning, stacklevel=3)
    elif found.shared:
        name, other = found.examples[0]
        warnings.warn(
            f"data.val: {found.shared} of {found.checked} images are among data.train, too, such as {name} ({other})",
            MppWarning,
            stacklevel=3,
        )
    pretrained_on = _in_pretraining(recipe, val)
    write_json(
        path,
        {
            "fingerprint": fingerprint,
            "classes": len(train.classes),
            "train_images": len(train),
            "val_images": len(val),
            "val_in_train": found.to_json(),
            "val_in_pretraining": pretrained_on.to_json() if pretrained_on else None,
            "left_out": {"train": train.left_out.found, "val": val.left_out.found},
        },
    )


def _in_pretraining(recipe: FinetuneRecipe, val: Images) -> Leak | None:
    """Validation images that the encoder saw without labels, where that was a run here whose shards are still there."""
    try:
        data = load_recipe(Path(recipe.encoder) / "recipe.yaml", PretrainRecipe).data
        if any(map(is_remote, data.shards)):
            return None  # not fetched for this
        return leak(val.reader, PackedReader(ShardImages(data.shards, key="data.shards", **data.opening())))
    except UserError:
        return None


def _doubts(recipe: FinetuneRecipe, train: Images, val: Images) -> list[str]:
    """Warnings about the images: boxes that are cut off, and what `check_images` finds. Raises as it does."""
    found = []
    for key, images in (("data.train", train), ("data.val", val)):
        if isinstance(images, Detected) and images.cut:
            many = f"{len(images.cut)} boxes run past their image and are cut off"
            found.append(f"{key}: {many}, such as {images.cut[0]}; a box is [x, y, width, height] in pixels")
        found += check_images(images, key, recipe.data.decoding(), recipe.data.max_bad_fraction)
    return found


def _cells(recipe: FinetuneRecipe, arms: list[str]) -> list[Cell]:
    """In the order in which they run. The number of labels is in a folder's name where there are several."""
    counts = recipe.data.label_counts()
    return [
        Cell(Path(recipe.out) / (f"labels{count}-" * (len(counts) > 1) + f"{arm}-seed{seed}"), arm, seed, count)
        for count in counts
        for seed in recipe.seeds
        for arm in arms
    ]


def _plot(result: FinetuneResult, out: Path) -> None:
    lines = []
    for arm in result.score:
        found = [(float(v.labels_per_class or 0), v.score[arm]) for v in result.verdicts]
        x, means = [n for n, _ in found], [100 * e.mean for _, e in found]
        widths = [100 * e.half_width for _, e in found]
        lines.append(Line(arm, x, means, None if any(map(math.isnan, widths)) else widths, dashed=arm == "scratch"))
    seeds = len(next(iter(result.score.values())).values)
    title = "mean of seeds, 95 % interval" if seeds > 1 else "one seed"
    draw({title: lines}, out, xlabel="labels a class", ylabel=f"{result.verdicts[-1].metric}, %", log_x=True)


def _task(recipe: FinetuneRecipe) -> Any:
    """The class of the task."""
    return registry.component("task", recipe.task.name)


def _open(recipe: FinetuneRecipe, split_name: Literal["train", "val"], classes: list[str] | None) -> Images:
    """Labeled images, as the task wants them. UserError where they are not."""
    task, places, key = _task(recipe), getattr(recipe.data, split_name), f"data.{split_name}"
    if task.labels == "mask":
        return open_segmented(places, key=key, classes=classes, ignore_index=recipe.task.ignore_index)
    if task.labels == "boxes":
        return open_detected(places, key=key, classes=classes)
    reading = {**recipe.data.opening(), "several": task.labels == "classes"}
    return open_labeled(places, key=key, classes=classes, **reading)


def _training_dataset(recipe: FinetuneRecipe, train: Images, subset: np.ndarray, seed: int) -> Any:
    """Augmented images of a subset."""
    data = recipe.data
    if isinstance(train, Labeled):
        return LabeledDataset(train, subset, _augmentation(recipe), seed, **data.decoding())
    return DenseDataset(
        train,
        subset,
        seed,
        size=data.image_size,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        color_jitter=data.color_jitter,
        **data.decoding(),
    )


def _judging_dataset(recipe: FinetuneRecipe, images: Images, views: int = 1) -> Any:
    """The same images every time: crops, or whole images where every place is judged."""
    data = recipe.data
    if isinstance(images, Labeled):
        return CentreDataset(images, data.image_size, data.val_crop_fraction, views=views, **data.decoding())
    if isinstance(images, Detected):
        return WholeDataset(images, fit_inside(data.image_size), data.image_size, **data.decoding())
    side_px = data.val_side_px or min(data.image_size)
    return WholeDataset(images, fit_shorter_side(side_px, data.image_size), None, **data.decoding())


def _arms(recipe: FinetuneRecipe) -> list[str]:
    if recipe.encoder == "scratch":
        return ["scratch"]
    return ["pretrained", "scratch"] if recipe.beside_scratch else ["pretrained"]


def _check(recipe: FinetuneRecipe, accelerator: Accelerator, arms: list[str], train: Images, val: Images) -> None:
    """Refuse what cannot run, before the run folder is made and the first cell has trained."""
    world = accelerator.num_processes
    if len(val) == 0:
        raise UserError(f"data.val: no images in {', '.join(recipe.data.val)}")
    if _task(recipe).labels in ("mask", "boxes") and not recipe.data.eight_bit:
        raise UserError(f"task: {recipe.task.name}: for images of 8 bit with 1, 3 or 4 channels alone")
    if _task(recipe).labels in ("class", "mask") and len(train.classes) < 2:
        raise UserError(
            f"data.train: only one class ({', '.join(train.classes) or 'none'}); at least two are needed"
            + _of_two_values(recipe, train)
        )
    for count in recipe.data.label_counts():
        subset = train.subset(labels_per_class=count, fraction=recipe.data.fraction, seed=recipe.seeds[0])
        if recipe.early_stop and not len(split(train.strata[subset], recipe.early_stop.fraction, 0)[1]):
            raise UserError("early_stop: to hold some out, a class needs two images at least")
    optim = recipe.optim
    accumulate = accumulation(optim.global_batch_size, world, optim.max_batch_per_device)
    on_device = optim.global_batch_size // world // accumulate
    if (recipe.mixup > 0 or recipe.cutmix > 0) and on_device % 2:
        raise UserError(f"mixup: needs an even number of images on a device; got {on_device}")
    _augmentation(recipe)
    for arm in arms:
        model = build(recipe, arm, recipe.seeds[0], len(train.classes))
        if recipe.lora and arm == "pretrained":
            lora.add(model.encoder, **recipe.lora.model_dump())
    if recipe.distill:
        _distillation(recipe, accelerator, model, train.classes)


def _of_two_values(recipe: FinetuneRecipe, train: Images) -> str:
    """The end of a message about masks of one class, for those that hold another value beside it."""
    if not isinstance(train, Segmented) or not train.ignored:
        return ""
    value = recipe.task.ignore_index
    return (
        f". The masks also hold the value {value} at {train.ignored} pixels; it is task.ignore_index and counts for "
        f"nothing. If {value} is the second class, write it as 1"
    )


def _augmentation(recipe: FinetuneRecipe) -> Any:
    """timm's training transform: PIL image -> (C, H, W) uint8. UserError for a policy timm does not know.

    Of images that are not of 8 bit: crops and flips alone, (bytes, generator) -> (C, H, W) float32.
    """
    data = recipe.data
    if not data.eight_bit:
        for key in ("auto_augment", "color_jitter"):  # the range may be the encoder's, which no recipe was checked with
            if getattr(data, key):
                allowed = "for images of 8 bit with 1, 3 or 4 channels alone, without value_range"
                raise UserError(f"data.{key}: {allowed}; data.{key}=null leaves it out")
        reading = data.decoding()
        return Crop(data.image_size, scale=data.crop_scale, ratio=data.crop_ratio, flip=data.flip, **reading).random
    if data.auto_augment and data.channels != 3:
        raise UserError(
            f"data.auto_augment: its policies are for 3 channels, of which data has {data.channels}; null leaves it out"
        )
    try:
        transform = create_transform(
            (data.channels, *data.image_size),
            is_training=True,
            use_prefetcher=True,  # uint8 out: normalised on the device
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            hflip=data.flip,
            color_jitter=data.color_jitter,  # type: ignore[arg-type]  # None: none, whatever timm's annotation says
            auto_augment=data.auto_augment,
            interpolation="bicubic",
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        known = "rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a, v0 and the like"
        raise UserError(f"data.auto_augment: timm has no policy {data.auto_augment!r}; allowed are {known}") from error
    for step in transform.transforms:
        for op in [*getattr(step, "ops", []), *(op for ops in getattr(step, "policy", []) for op in ops)]:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterized
    return transform


def _posterized(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm asks for 0 bits at the strongest, which is black; Pillow refuses that since 13."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _finished(cell: Path, fingerprint: str) -> dict[str, float] | None:
    """The metrics of a cell that is done. UserError where they were measured on other data."""
    try:
        result = json.loads((cell / RESULT).read_text())
        metrics = {k: math.nan if v is None else float(v) for k, v in result["metrics"].items()}
        before = result["fingerprint"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if before != fingerprint:
        raise UserError(f"{cell}: the data or the encoder changed since; start a new run")
    return metrics


def _run_cell(
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    cell: Cell,
    train: Images,
    val: Images,
    fingerprint: str,
    control: _Control,
) -> dict[str, float] | None:
    """Fine-tune one cell; its metrics, or None where a signal stopped it (with a checkpoint)."""
    rank, world, watch = accelerator.process_index, accelerator.num_processes, control.watch
    data, optim, seed, folder, task = recipe.data, recipe.optim, cell.seed, cell.folder, _task(recipe)
    accumulate = accumulation(optim.global_batch_size, world, optim.max_batch_per_device)
    # ---- model, data, optimizer
    model = build(recipe, cell.arm, seed, len(train.classes))
    subset = train.subset(labels_per_class=cell.labels_per_class, fraction=data.fraction, seed=seed)
    tune = subset[:0]
    if recipe.early_stop:
        fit, held = split(train.strata[subset], recipe.early_stop.fraction, seed)
        subset, tune = subset[fit], subset[held]
    if recipe.balance == "sampling":
        subset = subset[balanced(train.strata[subset], seed)]
    elif recipe.balance == "loss":
        model.task.weigh(torch.from_numpy(_counts(train, subset)))
    dataset = _training_dataset(recipe, train, subset, seed)
    order = Order([len(subset)], global_batch=optim.global_batch_size, seed=seed, lanes=1)
    total_steps = steps_of(optim.epochs, optim.steps, len(subset), optim.global_batch_size)
    warmup_steps = steps_of(optim.warmup_epochs, optim.warmup_steps, len(subset), optim.global_batch_size, least=0)
    base_lr, layer_decay, frozen = optim.base_lr, optim.layer_decay, recipe.frozen
    if cell.arm == "scratch":
        base_lr = recipe.scratch.base_lr or base_lr
        layer_decay = recipe.scratch.layer_decay or layer_decay
        frozen = frozen if recipe.scratch.frozen is None else recipe.scratch.frozen
    if frozen == 1:  # its batch norms, too, and no gradient is computed for it
        model.encoder.requires_grad_(False)
    adapted = recipe.lora if cell.arm == "pretrained" else None
    if adapted:
        torch.manual_seed(torch_seed(seed, Purpose.INIT))
        lora.add(model.encoder, **adapted.model_dump())
    groups = finetune_groups(
        model.encoder,
        nn.ModuleList([model.task, *([model.distilled] if model.distilled else [])]),
        weight_decay=optim.weight_decay,
        layer_decay=layer_decay,
        head_lr_scale=optim.head_lr_scale,
    )
    unfreeze(groups, frozen_steps=round(frozen * total_steps), gradual=recipe.unfreeze == "gradual")
    thaws_at = min((g["starts_at_step"] for g in groups if "starts_at_step" in g), default=total_steps)
    optimizer: Any = adamw(groups, optim.betas)
    averaged = copy.deepcopy(model).requires_grad_(False).to(accelerator.device) if recipe.ema_decay else None

    # ---- resume
    checkpoints, best_of = folder / "checkpoints", folder / "best"
    state: dict[str, Any] = {"step": 0, "best": -1.0, "best_step": 0, "worse": 0, "given_up": False}
    state |= {"skipped": 0, "bad": 0}
    path = on_main(accelerator, partial(checkpoint.newest, checkpoints))
    start_step = 0
    model.to(accelerator.device)
    if path is not None:
        state |= checkpoint.read_state(path)
        if state["data_fingerprint"] != fingerprint:
            raise UserError(f"{path}: the training data or the encoder changed since; start a new run")
        checkpoint.load(path, model, optimizer, averaged)
        start_step = state["step"]
    micro_loss = MicroLoss(recipe, accelerator, model, train.classes, seed)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    log = RunLog(
        folder,
        steps=total_steps,
        resumed_at=start_step,
        active=accelerator.is_main_process,
        label=f"{folder.name}  ",
        trackers=Trackers(accelerator, recipe.trackers, folder, settings_of(recipe), start_step),
    )
    control.until_the_end.callback(log.close)

    def ended(state: str, **more: Any) -> None:
        log.status(state, **more)
        control.status(state, cell=folder.name, **more)

    watch.status = ended
    log.say(
        f"{len(subset)} labeled images of {len(train.classes)} classes, {len(val)} to validate; "
        f"{total_steps} steps"
        + ("; the warm-up lasts longer: the full learning rate is never reached" if warmup_steps > total_steps else "")
        + (f"; resumed at step {start_step}" if path else "")
    )

    # ---- the loop
    sampler = MicroBatches(
        order,
        seen=start_step * optim.global_batch_size,
        steps=total_steps - start_step,
        accumulate=accumulate,
        rank=rank,
        world=world,
    )
    pin = accelerator.device.type == "cuda"
    stream_of_batches = batches(dataset, sampler, workers=data.workers, pin_memory=pin)
    log.status("running", step=start_step)
    best, best_step, worse, skipped = state["best"], state["best_step"], state["worse"], state["skipped"]
    bad = state["bad"]
    statistics = nonfinite.Statistics(model, needed=recipe.max_skipped_steps > 0)
    given_up = state["given_up"]
    step, began, steps_since = start_step, time.monotonic(), 0
    while step < total_steps and not given_up:
        faults.point("train.step_begins")
        prepared.train()  # also after a measurement
        model.encoder.train(step >= thaws_at)  # a frozen one keeps its batch norms' statistics, too
        micro_losses, bad_lines, replaced = [], [], 0
        statistics.remember()
        for m in range(accumulate):
            watch.at(step, "reading images")
            batch = next(stream_of_batches)
            bad_lines += batch.bad
            replaced += batch.replaced
            watch.at(step, "computing")
            with nullcontext() if m == accumulate - 1 else accelerator.no_sync(prepared):
                own_loss = micro_loss(prepared, batch.images, batch.labels, int(batch.positions[0])) / accumulate
                accelerator.backward(own_loss)
            micro_losses.append(own_loss.detach())
        trained = learning(optimizer.param_groups, step)
        grad_norm = accelerator.clip_grad_norm_(trained, optim.clip_grad_norm or math.inf)
        watch.at(step, "exchanging losses")
        loss, new_bad, stopping = sum_over_processes(
            accelerator, [float(torch.stack(micro_losses).sum()) / world, replaced, bool(control.stop_request)]
        )
        if new_bad:
            lines = gather_objects(accelerator, bad_lines)  # each process knows only its own
            seen = (step + 1) * optim.global_batch_size
            bad = count_unreadable(bad, int(new_bad), lines, seen, data.max_bad_fraction, log)
        finite = math.isfinite(float(grad_norm)) and math.isfinite(loss)
        if not finite:
            skipped += 1
            statistics.put_back()
            weights, keys = getattr(model.task, "class_weights", None), sampler.keys(step * optim.global_batch_size)
            record = {
                "arm": cell.arm,
                "encoder_learns": step >= thaws_at,
                "seed": seed,
                "classes": train.classes,
                "class_weights": None if weights is None else weights.tolist(),
                "seeds": [of_batch[0][0] for of_batch in keys],
                "losses": [[str(float(v) * accumulate)] for v in micro_losses],
                "samples": [[train.reader.name(int(subset[place])) for *_, place in of_batch] for of_batch in keys],
            }
            what = f"{folder.name} step {step}: loss {loss}, gradient norm {float(grad_norm)}"
            allowed = {"skipped": skipped, "allowed": recipe.max_skipped_steps}
            log.say(nonfinite.left_out(accelerator, folder, step, model, dataset, keys, record, what=what, **allowed))
        lr = (optim.global_batch_size / 256) * scheduled_lr(
            step, total_steps=total_steps, warmup_steps=warmup_steps, lr=base_lr, min_lr=optim.min_lr
        )
        if finite:
            set_lr(optimizer, lr)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, steps_since = step + 1, steps_since + 1
        if finite and averaged is not None and recipe.ema_decay:
            _average(averaged, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
        log.step()

        watch.at(step, SAVING)
        tuned = {}
        if recipe.early_stop and (step % recipe.early_stop.every_steps == 0 or step == total_steps):
            judged = averaged or model
            score = _judge(recipe, accelerator, judged, train, tune, "early_stop", headline_only=True).metrics[
                task.headline
            ]
            tuned = {f"tune_{task.headline}": score}
            worse += 1
            if score > best:
                best, best_step, worse = score, step, 0
                save_it = partial(checkpoint.save_together, accelerator, averaged=averaged)
                save_it(best_of, step, model, None, {}, keep=None)
            given_up = worse >= recipe.early_stop.patience
        ending = bool(stopping) or step == total_steps or given_up
        if step % recipe.log_every_steps == 0 or tuned or ending:
            rate = steps_since * optim.global_batch_size / max(time.monotonic() - began, 1e-9)
            began, steps_since = time.monotonic(), 0
            record = {"step": step, "seen": step * optim.global_batch_size, "loss": loss, "lr": lr}
            log.metrics({**record, **tuned, "grad_norm": float(grad_norm), "images_per_s": rate})
        if step % recipe.checkpoint_every_steps == 0 or ending:
            state = {
                "seen": step * optim.global_batch_size,
                "data_fingerprint": fingerprint,
                "best": best,
                "best_step": best_step,
                "worse": worse,
                "given_up": given_up,
                "skipped": skipped,
                "bad": bad,
            }
            save_it = partial(checkpoint.save_together, accelerator, averaged=averaged)
            try:
                save_it(checkpoints, step, model, optimizer, state, keep=recipe.keep_checkpoints)
                if accelerator.is_main_process:
                    checkpoint.keep_only(best_of, best_step)  # no checkpoint to go on from names another any more
            except UserError as error:
                if ending or recipe.if_unsaved == "stop":
                    raise
                log.say(f"warning: {error}; going on, as if_unsaved says")
        if stopping and step < total_steps and not given_up:
            why = control.stop_request.by or "a signal to another process"
            log.say(f"stopped at step {step} by {why}; go on with --resume auto")
            log.status("stopped", step=step, why=why)
            return None

    # ---- the verdict, after the last step or the one that was best on training images held out: none is chosen by
    # looking at the validation images
    judged = averaged or model
    if recipe.early_stop:
        checkpoint.load(best_of / f"step-{best_step:08d}", model, averaged=averaged, checked=True)
        log.say(f"step {best_step} of {step}: best on {len(tune)} training images held out, {100 * best:.2f} %")
    if adapted:  # before it is judged: what is told is what is exported
        lora.merge(judged.encoder)
    found = _judge(recipe, accelerator, judged, val, np.arange(len(val)), "data.val")
    if accelerator.is_main_process:
        save(judged, folder, recipe, found.metrics, train.classes)
        log.say(
            f"{task.headline} {100 * found.metrics[task.headline]:.2f} %"
            + (f", {found.unreadable} unreadable images left out" if found.unreadable else "")
        )
        for line in found.unreadable_lines:
            log.note(f"unreadable, data.val: {line}")
        if found.unread_classes:
            log.say(f"warning: {name_unread(found.unread_classes)}")
        log.status("finished", step=step)
        of_class = None if found.per_class is None else dict(zip(train.classes, found.per_class, strict=True))
        write_json(
            folder / RESULT,
            {
                "metrics": found.metrics,
                **({f"{task.headline}_per_class": of_class} if of_class is not None else {}),
                "unreadable": found.unreadable,
                "unread_classes": found.unread_classes,
                "step": step,
                "fingerprint": fingerprint,
            },
        )
        if isinstance(judged, Dense) and not isinstance(val, Labeled):
            _show(recipe, judged, val, folder / PICTURES)
    log.close()
    accelerator.wait_for_everyone()
    return found.metrics


class MicroLoss:
    """The loss of a micro-batch, with all that is drawn for it: a pure function of (weights, images, seed, position).

    model: on its device already, with adapters if it has any. classes: of the training images. UserError where the
    teacher of `distill` cannot teach them.
    """

    def __init__(
        self, recipe: FinetuneRecipe, accelerator: Accelerator, model: Supervised, classes: list[str], seed: int
    ) -> None:
        self.accelerator, self.model, self.seed = accelerator, model, seed
        mixing = recipe.mixup > 0 or recipe.cutmix > 0
        self.mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=len(classes)) if mixing else None
        erase = recipe.data.erase
        self.erase = RandomErasing(erase, mode="pixel", device=accelerator.device) if erase else None
        self.distillation = _distillation(recipe, accelerator, model, classes) if recipe.distill else None

    def __call__(self, prepared: Any, images: torch.Tensor, labels: Any, position: int) -> torch.Tensor:
        """prepared: the model, wrapped. images: (B, C, H, W) uint8. labels: as `LabeledBatch` has them.

        position: of the first sample in the run's sequence.
        """
        # after the batch was read, since a loader that starts draws, too
        seed_of_batch = torch_seed(self.seed, Purpose.STEP, position)
        torch.manual_seed(seed_of_batch)  # dropout, drop path
        random.seed(seed_of_batch)  # random erasing
        np.random.seed(torch_seed(self.seed, Purpose.MIX, position) % 2**32)  # mixup, cutmix
        x = self.model.normalise(images.to(self.accelerator.device, non_blocking=True))
        labels = send_to_device(labels, self.accelerator.device, non_blocking=True)
        if self.erase is not None:
            x = self.erase(x)
        if self.mix is not None:
            x, labels = self.mix(x, labels)
        outputs, own_loss = prepared(x, labels), self.model.task.loss
        if self.distillation is None:
            found: torch.Tensor = own_loss(outputs, labels)
            return found
        return self.distillation.loss(outputs, x, labels, own_loss)


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Weights move towards the model's; statistics of batch norms are its own."""
    for mean, p in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(p, 1 - decay)
    for copied, own in zip(averaged.buffers(), model.buffers(), strict=True):
        copied.copy_(own)


def _counts(train: Images, subset: np.ndarray) -> np.ndarray:
    """(classes,) images of each class, or pixels."""
    if isinstance(train, Segmented):
        return train.pixels[subset].sum(0)
    return np.bincount(train.strata[subset], minlength=len(train.classes))


def _distillation(
    recipe: FinetuneRecipe, accelerator: Accelerator, model: Supervised, classes: list[str]
) -> Distillation:
    """The teacher, where the model is. UserError where it cannot teach these classes."""
    keys = recipe.distill
    assert keys is not None
    teacher = open_teacher(keys.teacher, classes, recipe.data.channels).to(model.mean.device)
    mean, std = model.mean / 255, model.std / 255
    found = Distillation(
        teacher,
        kind=keys.kind,
        alpha=keys.alpha,
        temperature=keys.temperature,
        mean=mean,
        std=std,
        autocast=accelerator.autocast,
    )
    try:
        found.teach(torch.zeros(1, recipe.data.channels, *recipe.data.image_size, device=mean.device))
    except Exception as error:  # timm's models fail in their own ways
        raise UserError(f"distill.teacher: {keys.teacher} does not run: {one_line(error)}") from error
    return found


def _fingerprint(recipe: FinetuneRecipe, train: Images, val: Images) -> str:
    """What the cells are trained and judged on: the images, their labels, and the weights they begin with."""
    teacher = recipe.distill.teacher if recipe.distill else None
    return fingerprint_of_inputs(train.fingerprint(), val.fingerprint(), recipe.encoder, teacher)


class Judged(NamedTuple):
    """What a model is worth on some images."""

    metrics: dict[str, float]
    per_class: list[float | None] | None
    """The headline metric of each class, None where it has none; of tasks that have it so."""
    unreadable: int
    unreadable_lines: list[str]
    """A line for each of them."""
    unread_classes: list[str]
    """Classes that have images, of which not one could be read; of tasks with one label an image."""


def _unread_classes(cell: Path) -> tuple[str, ...]:
    """Classes whose validation images could not be read, as a finished cell has noted."""
    return tuple(json.loads((cell / RESULT).read_text()).get("unread_classes", ()))


def _judge(
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    model: Supervised,
    images: Images,
    chosen: np.ndarray,
    key: str,
    *,
    headline_only: bool = False,
) -> Judged:
    """Over the chosen images, each counted once, shared by all processes. Leaves the model in eval mode."""
    for value in model.buffers():  # batch norms keep statistics of each process; the first one's are exported
        value.copy_(broadcast(value))
    numbers = chosen[accelerator.process_index :: accelerator.num_processes].tolist()
    at_once = EVALUATION_BATCH if isinstance(images, Labeled) else WHOLE_IMAGES
    size = min(at_once, recipe.optim.max_batch_per_device)
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    own, read, unreadable_lines = [], list[int](), list[str]()
    model.eval()
    views = 1 if headline_only else recipe.data.val_views  # those on the way are many
    dataset = _judging_dataset(recipe, images, views)

    def run(x: torch.Tensor) -> Any:
        if views == 1:
            return model.run(x)
        several = model.task.labels == "classes"
        found = over_views(model.run, x if x.ndim == 5 else x.unsqueeze(1), mirrored=True, several=several)
        return found.logit(1e-7) if several else found.log()  # metrics want logits

    with torch.no_grad(), accelerator.autocast():
        for batch in batches(dataset, parts, workers=recipe.data.workers, pin_memory=False):
            there = batch.readable
            read += batch.positions[there].tolist()
            unreadable_lines += batch.bad
            if not there.any():
                continue
            x, labels = batch.images, batch.labels
            if isinstance(images, Labeled):  # crops have zeros where whole images leave out what cannot be read
                x, labels = x[there], labels[there]
            own.append(model.task.judge(run, x, labels, recipe.data.image_size))
    own, read = gather_objects(accelerator, own), gather_objects(accelerator, read)
    lines = gather_objects(accelerator, unreadable_lines)
    if not own:
        raise UserError(f"{key}: not one image can be read; the first: {lines[0]}")
    metrics = model.task.metrics(own, headline_only=headline_only)
    if math.isnan(metrics[model.task.headline]):
        raise UserError(f"{key}: none of these images has a label to judge by")
    each = None
    if not headline_only and hasattr(model.task, "per_class"):
        each = [None if math.isnan(v) else v for v in model.task.per_class(own).tolist()]
    lost: list[str] = []
    if isinstance(images, Labeled) and not images.several:
        lost = unread_classes(images, read, chosen.tolist())
    return Judged(metrics, each, len(chosen) - len(read), lines, lost)


def _show(recipe: FinetuneRecipe, model: Dense, images: Segmented | Detected, out: Path) -> None:
    """Truth and prediction of the first validation images, as a picture."""
    batch = _judging_dataset(recipe, images).__getitems__(list(range(min(SHOWN, len(images)))))
    if isinstance(batch, UserError) or not batch.readable.any():
        return
    rows, size = [], recipe.data.image_size
    if isinstance(images, Segmented):
        sizes = [(mask.shape[0], mask.shape[1]) for mask in batch.labels]
        said = model.task.predict(model.run, batch.images, sizes, size)
        for image, mask, classes in zip(batch.images, batch.labels, said, strict=True):
            whole = scaled_to(image, (mask.shape[0], mask.shape[1]))
            true = over_pixels(whole, mask, len(images.classes), mask == model.task.ignore_index)
            rows.append((whole, true, over_pixels(whole, classes.cpu(), len(images.classes))))
        show(
            rows,
            images.classes,
            out,
            extra="ignored" if any((m == model.task.ignore_index).any() for m in batch.labels) else None,
        )
        return
    said = model.task.predict(model.run, batch.images, batch.labels)
    for image, true, found in zip(batch.images, batch.labels, said, strict=True):
        sure = found["scores"] >= LEAST_SCORE
        drawn = (
            over_boxes(image, b["boxes"][k] * true["scale"], b["labels"][k], images.classes)
            for b, k in ((true, slice(None)), (found, sure))
        )
        rows.append((image, *drawn))
    show(rows, images.classes, out)
