"""Fine-tuning on labeled images, beside the same fine-tune from scratch: the loop, from top to bottom.

A cell is one arm (pretrained or scratch) with one seed. Each has a folder of its own with checkpoints, so a run
killed anywhere goes on in the cell where it was.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from mpp import checkpoint, distributed, exporting, registry
from mpp.build import build_component
from mpp.data.labeled import CentreDataset, Labeled, LabeledDataset, balanced, open_labeled, split
from mpp.data.loader import batches
from mpp.data.order import MicroBatches, Order
from mpp.diagnostics.plots import Line, draw
from mpp.distillation import Distillation, open_teacher
from mpp.errors import MppWarning, UserError, one_line
from mpp.metrics import RunLog, environment, write_json
from mpp.optim import adamw, finetune_groups, learning, scheduled_lr, set_lr, steps_of, unfreeze
from mpp.recipe import FinetuneRecipe
from mpp.rng import Purpose, torch_seed
from mpp.runfolder import create_run, find_run
from mpp.verdict import Estimate, Verdict, table

RESULT = "result.json"
PLOT = "label_efficiency.png"
EVALUATION_BATCH = 256
"""Images that are judged at once, unless optim.max_batch_per_device is less."""


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
        return table(self.verdicts)


@dataclass(frozen=True)
class Cell:
    """One arm with one seed and one number of labels."""

    folder: Path
    arm: str
    seed: int
    labels_per_class: int | None


def finetune(recipe: FinetuneRecipe, resume: str = "never") -> FinetuneResult:
    """Run a recipe. resume: "never" (the run folder must be new) or "auto".

    UserError for everything the user can correct.
    """
    if resume not in ("never", "auto"):
        raise UserError(f"--resume {resume}: fine-tuning has a checkpoint for each cell; allowed: auto, never")
    accelerator = distributed.start(recipe.precision)
    reading = {**recipe.data.caching(), "several": _task(recipe).several}
    train = open_labeled(recipe.data.train, key="data.train", classes=None, **reading)
    val = open_labeled(recipe.data.val, key="data.val", classes=train.classes, **reading)
    arms = _arms(recipe)
    exporting.check_source(recipe.encoder, key="encoder", more=("scratch",))
    recipe = _normalised_as_pretrained(recipe, warn=accelerator.is_main_process)
    _check(recipe, accelerator, arms, train, val)
    fingerprint = _fingerprint(recipe, train, val)
    find_run(recipe, resume, fingerprint=fingerprint)
    accelerator.wait_for_everyone()  # all have looked before one writes
    out = Path(recipe.out)
    if accelerator.is_main_process:
        create_run(recipe)
        write_json(out / "env.json", environment())
        if train.fingerprint() == val.fingerprint():
            what = "data.val: the same images as data.train; the accuracy says nothing"
            warnings.warn(what, MppWarning, stacklevel=2)

    cells = _cells(recipe, arms)
    measured: dict[Cell, dict[str, float]] = {}
    with distributed.stop_on_signals() as stop_request:
        for number, cell in enumerate(cells):
            metrics = _finished(cell.folder, fingerprint)
            if metrics is None:
                metrics = _run_cell(recipe, accelerator, cell, train, val, fingerprint, stop_request)
                (stopping,) = distributed.total(accelerator, [bool(stop_request)])
                if metrics is None or (stopping and number < len(cells) - 1):
                    if accelerator.is_main_process:
                        stopped = {"state": "stopped", "cell": cell.folder.name, "time": time.time()}
                        write_json(out / "status.json", stopped)
                    return FinetuneResult(out, "stopped", (), None)
            measured[cell] = metrics

    verdicts = []
    for count in recipe.data.label_counts():
        of_arm = {arm: [m for c, m in measured.items() if (c.labels_per_class, c.arm) == (count, arm)] for arm in arms}
        verdicts.append(Verdict.of(count, of_arm, _task(recipe).headline))
    most = next(c for c in cells if c.labels_per_class == verdicts[-1].labels_per_class)
    plot = out / PLOT if len(verdicts) > 1 else None
    result = FinetuneResult(out, "finished", tuple(verdicts), most.folder / "encoder", plot)
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
                "val_images": len(val.labels),
                "encoder": str(result.encoder),
            },
        )
        write_json(out / "status.json", {"state": "finished", "time": time.time()})
    return result


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


def _normalised_as_pretrained(recipe: FinetuneRecipe, *, warn: bool) -> FinetuneRecipe:
    """The recipe with the encoder's own mean and std where it gives none; a warning where it gives others."""
    own = exporting.own_normalisation(recipe.encoder, recipe.data.channels)
    if own is None:
        return recipe
    for key, value in zip(("mean", "std"), own, strict=True):
        given = getattr(recipe.data, key)
        if warn and given is not None and list(given) != value:
            shown = ", ".join(f"{v:g}" for v in value)
            warnings.warn(
                f"data.{key}: the encoder was trained with [{shown}]; left out, that is taken", MppWarning, stacklevel=3
            )
    mean, std = (tuple(getattr(recipe.data, k) or v) for k, v in zip(("mean", "std"), own, strict=True))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"mean": mean, "std": std})})


def _task(recipe: FinetuneRecipe) -> Any:
    """The class of the task."""
    return registry.component("tasks", recipe.task.name)


def _arms(recipe: FinetuneRecipe) -> list[str]:
    if recipe.encoder == "scratch":
        return ["scratch"]
    return ["pretrained", "scratch"] if recipe.beside_scratch else ["pretrained"]


def _check(recipe: FinetuneRecipe, accelerator: Accelerator, arms: list[str], train: Labeled, val: Labeled) -> None:
    """Refuse what cannot run, before the run folder is made and the first cell has trained."""
    world = accelerator.num_processes
    if len(val.labels) == 0:
        raise UserError(f"data.val: no images in {', '.join(recipe.data.val)}")
    if len(train.classes) < (1 if train.several else 2):
        raise UserError(
            f"data.train: one class alone, {', '.join(train.classes) or 'none'}; classification wants two at least"
        )
    for count in recipe.data.label_counts():
        subset = train.subset(labels_per_class=count, fraction=recipe.data.fraction, seed=recipe.seeds[0])
        if recipe.early_stop and not len(split(train.labels[subset], recipe.early_stop.fraction, 0)[1]):
            raise UserError("early_stop: to hold some out, a class needs two images at least")
    optim = recipe.optim
    accumulate = distributed.accumulation(optim.global_batch_size, world, optim.max_batch_per_device)
    on_device = optim.global_batch_size // world // accumulate
    if (recipe.mixup > 0 or recipe.cutmix > 0) and on_device % 2:
        raise UserError(f"mixup: needs an even number of images on a device; got {on_device}")
    _augmentation(recipe)
    for arm in arms:
        model = _build(recipe, arm, recipe.seeds[0], len(train.classes))
    if recipe.distill:
        _distillation(recipe, accelerator, model, train.classes)


def _augmentation(recipe: FinetuneRecipe) -> Any:
    """timm's training transform: PIL image -> (C, H, W) uint8. UserError for a policy timm does not know."""
    data = recipe.data
    if data.auto_augment and data.channels != 3:
        raise UserError(f"data.auto_augment: its policies are for 3 channels; got {data.channels}")
    try:
        return create_transform(
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


def _finished(cell: Path, fingerprint: str) -> dict[str, float] | None:
    """The metrics of a cell that is done. UserError where they were measured on other data."""
    try:
        result = json.loads((cell / RESULT).read_text())
        metrics, before = {k: float(v) for k, v in result["metrics"].items()}, result["fingerprint"]
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    if before != fingerprint:
        raise UserError(f"{cell}: the data or the encoder changed since; start a new run")
    return metrics


class Classifier(nn.Module):
    """A timm encoder, pooled, and a task's head; a second one for the distillation token, where a teacher has one."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        task: nn.Module,
        mean: list[float],
        std: list[float],
        distilled: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.task, self.distilled = encoder, task, distilled
        self.register_buffer("mean", 255 * torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> float32."""
        return (images.float() - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) normalised -> (B, classes) logits; those of both heads apart in training."""
        if self.distilled is None:
            return self.task(self.encoder(x))
        tokens = self.encoder.forward_features(x)  # type: ignore[operator]
        first, second = self.task(tokens[:, 0]), self.distilled(tokens[:, 1])
        return (first, second) if self.training else (first + second) / 2


def _build(recipe: FinetuneRecipe, arm: str, seed: int, num_classes: int) -> Classifier:
    """The model of a cell, initialised from its seed. UserError where the encoder cannot be had so."""
    torch.manual_seed(torch_seed(seed, Purpose.INIT))
    encoder = _encoder(recipe, pretrained=arm == "pretrained", pool=None)
    wanted = "avg" if recipe.pool == "mean" else "token"
    if wanted == "token" and getattr(encoder, "num_prefix_tokens", 0) == 0:
        raise UserError(f"pool: token: {type(encoder).__name__} has no class token here; allowed: mean")
    if wanted == "avg" and type(encoder).__name__ == "VisionTransformerDistilled":
        raise UserError("pool: mean: timm's distilled DeiTs read their class and distillation tokens; allowed: token")
    own = getattr(encoder, "global_pool", wanted)
    if isinstance(own, str) and own != wanted:  # convolutional families have a pooling layer there, over the map
        torch.manual_seed(torch_seed(seed, Purpose.INIT))
        # keeps the final norm where its weights are; timm would drop them with the change of pooling
        keep_norm = "use_fc_norm" if type(encoder).__name__ in ("Eva", "Beit") else "fc_norm"
        takes = inspect.signature(type(encoder).__init__).parameters
        pool = {"global_pool": wanted, **({keep_norm: False} if keep_norm in takes else {})}
        encoder = _encoder(recipe, pretrained=arm == "pretrained", pool=pool)
    exporting.check_size(encoder, recipe.data.image_size)
    width = _width(encoder, recipe)
    task = build_component("task", recipe.task, width, num_classes)
    distilled = None
    if recipe.distill and type(encoder).__name__ == "VisionTransformerDistilled":
        distilled = build_component("task", recipe.task, width, num_classes)
    return Classifier(encoder, task, *recipe.data.mean_std(), distilled)


@torch.no_grad()
def _width(encoder: nn.Module, recipe: FinetuneRecipe) -> int:
    """Of what the encoder gives for an image; some families widen it after pooling. UserError where it does not run."""
    blank = torch.zeros(1, recipe.data.channels, *recipe.data.image_size)
    try:
        found = encoder.eval()(blank)
    except Exception as error:  # timm's models fail in their own ways at a size or window that does not fit
        words, size = one_line(error), "×".join(map(str, recipe.data.image_size))
        raise UserError(f"data.image_size: {type(encoder).__name__} does not run at {size} px: {words}") from error
    encoder.train()
    if found.ndim != 2:
        raise UserError(f"encoder: {type(encoder).__name__} gives {tuple(found.shape[1:])} for an image, not a vector")
    return int(found.shape[1])


def _encoder(recipe: FinetuneRecipe, *, pretrained: bool, pool: dict[str, Any] | None) -> Any:
    return exporting.open_encoder(
        recipe.encoder,
        architecture=recipe.architecture,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        pretrained=pretrained,
        **({"drop_path_rate": recipe.drop_path_rate} if recipe.drop_path_rate else {}),
        **(pool or {}),
    )


def _run_cell(
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    cell: Cell,
    train: Labeled,
    val: Labeled,
    fingerprint: str,
    stop_request: distributed.StopRequest,
) -> dict[str, float] | None:
    """Fine-tune one cell; its metrics, or None where a signal stopped it (with a checkpoint)."""
    rank, world = accelerator.process_index, accelerator.num_processes
    data, optim, seed, folder, task = recipe.data, recipe.optim, cell.seed, cell.folder, _task(recipe)
    accumulate = distributed.accumulation(optim.global_batch_size, world, optim.max_batch_per_device)
    # ---- model, data, optimizer
    model = _build(recipe, cell.arm, seed, len(train.classes))
    subset = train.subset(labels_per_class=cell.labels_per_class, fraction=data.fraction, seed=seed)
    tune = subset[:0]
    if recipe.early_stop:
        fit, held = split(train.labels[subset], recipe.early_stop.fraction, seed)
        subset, tune = subset[fit], subset[held]
    if recipe.balance == "sampling":
        subset = subset[balanced(train.labels[subset], seed)]
    elif recipe.balance == "loss":
        counts = torch.from_numpy(np.bincount(train.labels[subset], minlength=len(train.classes)))
        model.task.weigh(counts)  # type: ignore[operator]
    dataset = LabeledDataset(train, subset, _augmentation(recipe), seed, **data.decoding())
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
    mixing = recipe.mixup > 0 or recipe.cutmix > 0
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=len(train.classes)) if mixing else None
    erase = RandomErasing(data.erase, mode="pixel", device=accelerator.device) if data.erase else None

    # ---- resume
    checkpoints, best_of = folder / "checkpoints", folder / "best"
    state: dict[str, Any] = {"step": 0, "best": -1.0, "best_step": 0, "worse": 0, "given_up": False}
    path = checkpoint.newest(checkpoints)
    start_step = 0
    model.to(accelerator.device)
    if path is not None:
        state |= checkpoint.read_state(path)
        if state["data_fingerprint"] != fingerprint:
            raise UserError(f"{path}: the training data or the encoder changed since; start a new run")
        checkpoint.load(path, model, optimizer, averaged)
        start_step = state["step"]
    distillation = _distillation(recipe, accelerator, model, train.classes) if recipe.distill else None
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
    )
    log.say(
        f"{len(subset)} labeled images of {len(train.classes)} classes, {len(val.labels)} to validate; "
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
    best, best_step, worse = state["best"], state["best_step"], state["worse"]
    given_up = state["given_up"]
    step, began, steps_since = start_step, time.monotonic(), 0
    while step < total_steps and not given_up:
        prepared.train()  # also after a measurement
        model.encoder.train(step >= thaws_at)  # a frozen one keeps its batch norms' statistics, too
        micro_losses, bad_lines = [], []
        for m in range(accumulate):
            batch = next(stream_of_batches)
            bad_lines += batch.bad
            # after the batch, since a loader that starts draws, too
            position = int(batch.positions[0])
            seed_of_batch = torch_seed(seed, Purpose.STEP, position)
            torch.manual_seed(seed_of_batch)  # dropout, drop path
            random.seed(seed_of_batch)  # random erasing
            np.random.seed(torch_seed(seed, Purpose.MIX, position) % 2**32)  # mixup, cutmix
            x = model.normalise(batch.images.to(accelerator.device, non_blocking=True))
            labels = batch.labels.to(accelerator.device, non_blocking=True)
            if erase is not None:
                x = erase(x)
            if mix is not None:
                x, labels = mix(x, labels)
            with nullcontext() if m == accumulate - 1 else accelerator.no_sync(prepared):
                logits, own_loss = prepared(x), model.task.loss
                if distillation is None:
                    micro_loss = own_loss(logits, labels) / accumulate  # type: ignore[operator]
                else:
                    micro_loss = distillation.loss(logits, x, labels, own_loss) / accumulate  # type: ignore[arg-type]
                accelerator.backward(micro_loss)
            micro_losses.append(micro_loss.detach())
        trained = learning(optimizer.param_groups, step)
        grad_norm = accelerator.clip_grad_norm_(trained, optim.clip_grad_norm or math.inf)
        loss, new_bad, stopping = distributed.total(
            accelerator, [float(torch.stack(micro_losses).sum()) / world, len(bad_lines), bool(stop_request)]
        )
        if new_bad:
            for line in gather_object(bad_lines):  # each process knows of its own alone
                log.say(f"unreadable, replaced by its neighbour: {line}")
        if not math.isfinite(float(grad_norm)) or not math.isfinite(loss):
            log.status("failed", step=step, why="non-finite loss or gradient")
            raise UserError(
                f"{folder.name} step {step}: loss {loss}, gradient norm {float(grad_norm)}: stopped before the "
                "update. Try a lower optim.base_lr, optim.clip_grad_norm, or precision: fp32"
            )
        lr = (optim.global_batch_size / 256) * scheduled_lr(
            step, total_steps=total_steps, warmup_steps=warmup_steps, lr=base_lr, min_lr=optim.min_lr
        )
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, steps_since = step + 1, steps_since + 1
        if averaged is not None and recipe.ema_decay:
            _average(averaged, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
        log.step()

        tuned = {}
        if recipe.early_stop and (step % recipe.early_stop.every_steps == 0 or step == total_steps):
            judged = averaged or model
            found, _ = _evaluate(recipe, accelerator, judged, train, tune, "early_stop", headline_only=True)
            score = found[task.headline]
            tuned = {f"tune_{task.headline}": score}
            worse += 1
            if score > best:
                best, best_step, worse = score, step, 0
                if accelerator.is_main_process:
                    checkpoint.save(best_of, step, model, None, {}, keep=None, averaged=averaged)
            given_up = worse >= recipe.early_stop.patience
        ending = bool(stopping) or step == total_steps or given_up
        if step % recipe.log_every_steps == 0 or tuned or ending:
            rate = steps_since * optim.global_batch_size / max(time.monotonic() - began, 1e-9)
            began, steps_since = time.monotonic(), 0
            record = {"step": step, "seen": step * optim.global_batch_size, "loss": loss, "lr": lr}
            log.metrics({**record, **tuned, "grad_norm": float(grad_norm), "images_per_s": rate})
        if step % recipe.checkpoint_every_steps == 0 or ending:
            if accelerator.is_main_process:
                state = {
                    "seen": step * optim.global_batch_size,
                    "data_fingerprint": fingerprint,
                    "best": best,
                    "best_step": best_step,
                    "worse": worse,
                    "given_up": given_up,
                }
                checkpoint.save(
                    checkpoints, step, model, optimizer, state, keep=recipe.keep_checkpoints, averaged=averaged
                )
                checkpoint.keep_only(best_of, best_step)  # no checkpoint to go on from names another any more
            accelerator.wait_for_everyone()
        if stopping and step < total_steps and not given_up:
            log.say(f"stopped at step {step}; go on with --resume auto")
            log.status("stopped", step=step)
            log.close()
            return None

    # ---- the verdict, after the last step or the one that was best on training images held out: none is chosen by
    # looking at the validation images
    judged = averaged or model
    if recipe.early_stop:
        accelerator.wait_for_everyone()
        checkpoint.load(best_of / f"step-{best_step:08d}", model, averaged=averaged)
        log.say(f"step {best_step} of {step}: best on {len(tune)} training images held out, {100 * best:.2f} %")
    metrics, unreadable = _evaluate(recipe, accelerator, judged, val, np.arange(len(val.labels)), "data.val")
    if accelerator.is_main_process:
        _save(judged, folder, recipe, metrics, train.classes)
        log.say(
            f"{task.headline} {100 * metrics[task.headline]:.2f} %"
            + (f", {unreadable} unreadable images left out" if unreadable else "")
        )
        log.status("finished", step=step)
        write_json(
            folder / RESULT,
            {"metrics": metrics, "unreadable": unreadable, "step": step, "fingerprint": fingerprint},
        )
    log.close()
    accelerator.wait_for_everyone()
    return metrics


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Weights move towards the model's; statistics of batch norms are its own."""
    for mean, p in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(p, 1 - decay)
    for copied, own in zip(averaged.buffers(), model.buffers(), strict=True):
        copied.copy_(own)


def _distillation(
    recipe: FinetuneRecipe, accelerator: Accelerator, model: Classifier, classes: list[str]
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


def _fingerprint(recipe: FinetuneRecipe, train: Labeled, val: Labeled) -> str:
    """What the cells are trained and judged on: the images, their labels, and the weights they begin with."""
    teacher = recipe.distill.teacher if recipe.distill else None
    return exporting.fingerprint(train.fingerprint(), val.fingerprint(), recipe.encoder, teacher)


def _evaluate(
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    model: Classifier,
    images: Labeled,
    chosen: np.ndarray,
    key: str,
    *,
    headline_only: bool = False,
) -> tuple[dict[str, float], int]:
    """(metrics, unreadable images) over the chosen images, each counted once, shared by all processes.

    Leaves the model in eval mode.
    """
    data = recipe.data
    dataset = CentreDataset(images, data.image_size, data.val_crop_fraction, **data.decoding())
    for value in model.buffers():  # batch norms keep statistics of each process; the first one's are exported
        value.copy_(broadcast(value))
    numbers = chosen[accelerator.process_index :: accelerator.num_processes].tolist()
    size = min(EVALUATION_BATCH, recipe.optim.max_batch_per_device)
    parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    own: list[tuple[Tensor, Tensor]] = []
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        for batch in batches(dataset, parts, workers=data.workers, pin_memory=False):
            readable = batch.readable
            x = model.normalise(batch.images.to(accelerator.device))
            own.append((model(x).float().cpu()[readable], batch.labels[readable]))
    parts_of_all = gather_object(own) if accelerator.num_processes > 1 else own
    logits, labels = (torch.cat(t) for t in zip(*parts_of_all, strict=True))
    if len(labels) == 0:
        raise UserError(f"{key}: not one image can be read")
    return model.task.metrics(logits, labels, headline_only=headline_only), len(chosen) - len(labels)  # type: ignore[operator]


def _save(model: Classifier, cell: Path, recipe: FinetuneRecipe, metrics: dict[str, float], classes: list[str]) -> None:
    """The fine-tuned model as a timm folder: with its classifier where timm's is the same linear layers."""
    encoder: Any = model.encoder
    tasks: list[Any] = [task for task in (model.task, model.distilled) if task is not None]
    if tasks[0].hidden is None and hasattr(encoder, "reset_classifier"):
        encoder.reset_classifier(len(classes))
        found = encoder.get_classifier()
        theirs = list(found) if isinstance(found, tuple) else [found]
        # the mean of one layer over two tokens is that layer over their mean, which is what was trained
        tasks = tasks * len(theirs) if len(tasks) == 1 else tasks
        if len(theirs) == len(tasks) and all(isinstance(layer, nn.Linear) for layer in theirs):
            for layer, task in zip(theirs, tasks, strict=True):
                layer.load_state_dict(task.out.state_dict())
            encoder.to(tasks[0].out.weight.device)
            exporting.save_encoder(encoder, cell / "encoder", recipe, metrics, classes)
            return
        encoder.reset_classifier(0)
    exporting.save_encoder(encoder, cell / "encoder", recipe, metrics)
