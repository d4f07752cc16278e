"""`mpp replay`: repeat a step whose loss or gradient was not finite, and report where this began."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpp.data.batch import Units
from mpp.data.labeled_sets import LabeledBatch
from mpp.errors import UserError
from mpp.finetuning import lora
from mpp.finetuning.approaches import recipe_of_approach
from mpp.finetuning.micro_loss import MicroLoss, UnlabeledInputs
from mpp.finetuning.model import build
from mpp.objective.build import build_model
from mpp.parallel.team import start_team
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.flat import JsonObject
from mpp.recipe.loading import load_recipe
from mpp.recipe.pretrain import PretrainRecipe
from mpp.runs import checkpoint
from mpp.runs.records import RECIPE, checkpoints_in
from mpp.training import nonfinite

SAME = 1e-5
"""Relative difference up to which two losses count as the same, since sums may be in another order."""


@dataclass(frozen=True)
class Replayed:
    """The result of `replay`."""

    folder: Path
    same: bool
    """Whether every loss is the same as in the run."""
    lines: tuple[str, ...]
    """Report for the terminal: a line for each micro-batch, and findings for those that are not finite."""


def replay(run: str | Path, step: int | None = None) -> Replayed:
    """Repeat a kept step of a run on one process.

    Args:
        run: Folder of a pretraining run or of a trial, or a fine-tune in which only one trial kept a step.
        step: Number of the step. None means the last one that was kept.

    Raises:
        UserError: If no step or not this step was kept.
    """
    folder = Path(run)
    if not checkpoints_in(folder / nonfinite.FOLDER):
        trials = [p.parent for p in sorted(folder.glob(f"*/{nonfinite.FOLDER}")) if checkpoints_in(p)]
        if len(trials) != 1:
            which = f"; name one of {', '.join(map(str, trials))}" if trials else ""
            raise UserError(f"{run}: no step was kept: all losses and gradients were finite{which}")
        folder = trials[0]
    kept = checkpoints_in(folder / nonfinite.FOLDER)
    at = next((p for p in kept if step is None or p.name == f"step-{step:08d}"), None)
    if at is None:
        raise UserError(f"--step {step}: not kept; kept steps: {', '.join(str(_step(p)) for p in kept)}")
    shares = nonfinite.read(at)
    pretrained = (folder / RECIPE).exists()
    model, averaged, loss_of = _pretraining(folder) if pretrained else _finetuning(folder, shares[0])
    checkpoint.load(at, model, averaged=averaged, checked=True)
    model.train()
    if not shares[0].record.get("encoder_learns", True):  # it was still frozen, and in eval mode
        model.encoder.eval()  # type: ignore[union-attr]
    lines, same = [], True
    for share in shares:
        for m, batch in enumerate(share.micro_batches):
            with _Began(model) as began:
                losses = loss_of(share, m, batch)
            losses.sum().backward()
            now, before = losses.tolist(), [float(v) for v in share.record["losses"][m]]
            same &= all(map(_same, now, before))
            lines.append(f"process {share.rank}, micro-batch {m}: loss {_shown(now)}; in the run {_shown(before)}")
            if not all(map(math.isfinite, now)):
                lines.append(f"  first in {began.where}" if began.where else "  in the loss itself")
                views = getattr(model, "views", 1)
                alone = {i: _alone(batch, i, views) for i in range(0, len(batch["images"]), views)}
                with torch.no_grad():
                    culprits = [i for i, b in alone.items() if not loss_of(share, m, b).isfinite().all()]
                if len(culprits) == len(alone) > 1:
                    lines.append("  each image by itself gives such a loss, so the weights are the likely cause")
                elif not culprits and "strong" in batch:
                    lines.append("  no labeled image by itself; unlabeled images were not tried")
                else:
                    lines += [f"  also by itself: {share.record['samples'][m][i]}" for i in culprits]
    gradients = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if gradients:
        lines.append(f"{len(gradients)} parameters have gradients that are not finite, such as {gradients[0]}")
    return Replayed(at, same, tuple(lines))


LossOf = Callable[[nonfinite.Share, int, JsonObject], Tensor]
"""Loss function: (share of a process, number of the micro-batch, its tensors or some of their rows) -> (losses,)."""


def _pretraining(run: Path) -> tuple[nn.Module, nn.Module | None, LossOf]:
    recipe = load_recipe(run / RECIPE, PretrainRecipe)
    team = start_team(recipe.precision, device=recipe.device)
    model, _ = build_model(recipe)
    model.to(team.device)

    def loss_of(share: nonfinite.Share, m: int, batch: JsonObject) -> Tensor:
        torch.manual_seed(share.record["seeds"][m])
        images, mask, noise = (batch[name].to(team.device) for name in ("images", "mask", "noise"))
        with team.autocast():
            losses: Tensor = model(images, Units(mask, share.record["hidden_units"][m], noise))
        return losses

    return model, None, loss_of


def _finetuning(trial: Path, share: nonfinite.Share) -> tuple[nn.Module, nn.Module | None, LossOf]:
    record = share.record
    recipe = recipe_of_approach(load_recipe(trial.parent / RECIPE, FinetuneRecipe), record["approach"])
    team = start_team(recipe.precision, device=recipe.device)
    model = build(recipe, record["approach"], record["seed"], len(record["classes"]))
    if recipe.lora:
        lora.add(model.encoder, **recipe.lora.model_dump())
    if record["class_weights"] is not None:
        model.task.class_weights = torch.tensor(record["class_weights"])
    model.to(team.device)
    averaged = copy.deepcopy(model).requires_grad_(False) if recipe.unlabeled else None
    unlabeled = None
    if averaged is not None:
        counts, mean = (record.get(name) for name in ("class_counts", "mean_prediction"))
        unlabeled = UnlabeledInputs(averaged, record["total_steps"], counts or [1] * len(record["classes"]), mean)
    micro_loss = MicroLoss(recipe, team, model, record["classes"], record["seed"], unlabeled)

    def loss_of(share: nonfinite.Share, m: int, batch: JsonObject) -> Tensor:
        with team.autocast():
            loss = micro_loss(model, LabeledBatch(**batch, bad=[]), share.record["seeds"][m])
        return loss.view(1)

    return model, averaged, loss_of


def _alone(batch: JsonObject, first: int, views: int) -> JsonObject:
    """Return a batch with one image of a batch, given twice, and with all of its masks.

    Mixing needs pairs of images, and batch norms need more than one. Unlabeled images are left out, since their number
    differs.

    Args:
        batch: Tensors of the micro-batch by name.
        first: Row of the image's first view.
        views: Number of views of each image.
    """
    found = {}
    for key, value in batch.items():
        if key not in ("weak", "strong"):
            rows = len(value) // len(batch["images"])  # an image may have several masks
            alone = value[first * rows : (first + views) * rows]
            found[key] = torch.cat([alone, alone]) if isinstance(alone, Tensor) else [*alone, *alone]
    return found


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class _Began:
    """Context manager that records the first module whose output is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.where = model, ""
        self._hooks: list[Any] = []

    def __enter__(self) -> _Began:
        for name, module in self.model.named_modules():
            if not list(module.children()):
                self._hooks.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *args: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if not self.where and isinstance(output, Tensor) and not output.isfinite().all():
                self.where = f"{name} ({type(module).__name__})"

        return look


def _same(a: float, b: float) -> bool:
    if math.isfinite(a) and math.isfinite(b):
        return math.isclose(a, b, rel_tol=SAME)
    return str(a) == str(b)


def _shown(losses: list[float]) -> str:
    return ", ".join(f"{v:.6g}" for v in losses)
