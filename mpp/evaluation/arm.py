"""Evaluate one arm, which is an encoder or a control: read its features and fit every probe to them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpp.data.labeled import Labeled
from mpp.data.labeled_sets import CentreDataset, LabeledBatch
from mpp.data.loader import batches
from mpp.encoders.resolve import for_channels
from mpp.encoders.sources import check_size, open_encoder
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError
from mpp.evaluation.features import EncoderReader, Place, Read, Table, read_table
from mpp.evaluation.probes import attentive, knn, linear
from mpp.evaluation.result import RESULT, Score, best_setting, sweep_as_text
from mpp.parallel.team import Team
from mpp.recipe.evaluate import EvaluateRecipe
from mpp.rng import Purpose, stream, torch_seed
from mpp.runs.log import format_duration
from mpp.runs.loop_progress import LoopProgress


@dataclass(frozen=True)
class Arm:
    """Scores of one encoder or control."""

    scores: list[Score]
    judged: list[int]
    """Number of readable validation images of each class"""
    unreadable: list[str]
    """A line for each training or validation image that could not be read"""


@dataclass
class Data:
    """Labeled images, split into the parts that the probes need."""

    train: Labeled
    val: Labeled
    fit: np.ndarray
    """Indices of the training images that probes are fitted to while settings are chosen."""
    tune: np.ndarray
    """Indices of the training images by whose accuracy settings are chosen."""


@dataclass
class _Opened:
    """A reader of features and the (H, W) of its images."""

    reader: nn.Module
    size: tuple[int, int]


def open_reader(recipe: EvaluateRecipe, arm: str) -> _Opened:
    """Open the encoder of an arm as a reader of features.

    Args:
        recipe: Recipe of the evaluation.
        arm: "encoder", "compare" or "random".

    Raises:
        UserError: If the encoder cannot be opened with these settings.
    """
    data = recipe.data
    torch.manual_seed(torch_seed(recipe.seed, Purpose.INIT))
    source = recipe.compare if arm == "compare" else recipe.encoder
    assert source is not None
    model: TimmModel = open_encoder(
        source,
        architecture=None if arm == "compare" else recipe.architecture,
        image_size=data.image_size,
        channels=data.channels,
        pretrained=arm != "random",
    )
    timm_config = model.pretrained_cfg
    size = data.image_size or tuple(timm_config["input_size"][1:])
    check_size(model, size, source)
    mean = data.mean or for_channels(timm_config["mean"], data.channels)
    std = data.std or for_channels(timm_config["std"], data.channels)
    return _Opened(EncoderReader(model, recipe.layers, mean, std), (int(size[0]), int(size[1])))


def finished_arm(folder: Path, fingerprint: str) -> Arm | None:
    """Return the result of an arm from its folder; None if the arm is not finished.

    Args:
        folder: Folder of the arm.
        fingerprint: Fingerprint of data and weights.

    Raises:
        UserError: If the result is of other data or weights.
    """
    try:
        stored = json.loads((folder / RESULT).read_text())
        arm = Arm([Score(**s) for s in stored["scores"]], stored["judged"], stored["unreadable"])
        before = stored["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if before != fingerprint:
        raise UserError(f"{folder}: the data or the encoder changed since; start a new run")
    return arm


def run_arm(
    recipe: EvaluateRecipe, team: Team, reader: nn.Module, data: Data, size: tuple[int, int], folder: Path
) -> Arm:
    """Fit and judge every probe at every layer and pooling of one arm.

    Args:
        recipe: Recipe of the evaluation.
        team: The processes.
        reader: Module that returns the features of images.
        data: Images to fit probes to, to choose settings by, and to judge probes by.
        size: (H, W) of the images.
        folder: Folder for the tables of features, which are deleted unless `keep_features` is set.

    Returns:
        The scores, with the images that could not be read.

    Raises:
        UserError: If no image of the fit, tune or validation part can be read, or the disk is too small.
    """
    device, scores = team.device, list[Score]()
    keys, classes = recipe.data, len(data.train.classes)
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted attempt
    progress = LoopProgress()
    judged, unreadable = np.bincount(data.val.labels, minlength=classes), list[str]()

    def images(
        of: Labeled, numbers: np.ndarray, batch_size: int, what: str, *, time_left: bool = True
    ) -> Iterator[LabeledBatch]:
        dataset = CentreDataset(of, size, keys.val_crop_fraction, **keys.decoding())
        parts = [numbers[i : i + batch_size].tolist() for i in range(0, len(numbers), batch_size)]
        loaded = batches(dataset, parts, workers=keys.workers, pin_memory=device.type == "cuda")
        yield from progress.shown(loaded, f"{folder.name}: {what}, batch", len(parts), time_left=time_left)

    def read(pixels: Tensor, *, tokens: bool = False) -> Read:
        """Compute features in the run's precision. Only this uses it; probes are trained in float32."""
        with team.autocast():
            return reader(pixels, tokens=tokens)

    # ---- pooled features, computed once
    if {"knn", "linear"} & set(recipe.probes):
        both = np.concatenate([data.fit, data.tune])
        train = read_table(
            read, images(data.train, both, keys.batch_size, "training images"), len(both), len(data.fit),
            folder / "features" / "train", device,
        )  # fmt: skip
        everything = np.arange(len(data.val.labels))
        val = read_table(
            read, images(data.val, everything, keys.batch_size, "validation images"), len(everything), 0,
            folder / "features" / "val", device,
        )  # fmt: skip
        judged, unreadable = np.bincount(val.labels, minlength=classes), train.unreadable + val.unreadable
        if len(val.labels) == 0 or train.first in (0, len(train.labels)):
            key = "train" if len(val.labels) else "val"
            raise UserError(f"data.{key}: too many images cannot be read; the first: {unreadable[0]}")
        for place in progress.shown(train.features, f"{folder.name}: probes, layer and pooling", len(train.features)):
            if "knn" in recipe.probes:
                scores.append(_knn(recipe, place, train, val, classes, device))
            if "linear" in recipe.probes:
                scores.append(_linear(recipe, place, train, val, classes, device))
        if not recipe.keep_features:
            del train, val  # release the memory-mapped files before they are deleted
            shutil.rmtree(folder / "features")

    # ---- tokens, computed again in every epoch
    if "attentive" in recipe.probes and isinstance(reader, EncoderReader):
        unread, unread_val = dict.fromkeys(unreadable), set[int]()

        def tokens(of: Labeled, numbers: np.ndarray, what: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for batch in images(of, numbers, recipe.attentive.batch_size, what, time_left=False):
                readable = batch.readable.to(device)
                unread.update(dict.fromkeys(batch.bad))
                if of is data.val:
                    unread_val.update(batch.positions[~batch.readable].tolist())
                features = read(batch.images.to(device), tokens=True)
                yield {k: v[readable] for k, v in features.tokens.items()}, batch.labels.to(device)[readable]

        scores += _attentive(recipe, data, tokens, classes, device)
        unreadable = list(unread)
        judged = np.bincount(np.delete(data.val.labels, sorted(unread_val)), minlength=classes)
    folder.mkdir(parents=True, exist_ok=True)
    return Arm(scores, judged.tolist(), unreadable)


def _knn(recipe: EvaluateRecipe, place: Place, train: Table, val: Table, classes: int, device: torch.device) -> Score:
    x, labels, first = train.features[place], train.labels, train.first
    ks = recipe.knn.k
    tuned = knn.accuracies(x[:first], labels[:first], x[first:], labels[first:], ks, classes, device)
    k = best_setting(tuned, smaller=True)
    accuracy_at = knn.accuracies(x, labels, val.features[place], val.labels, sorted({*ks, k}), classes, device)
    return Score("knn", *place, accuracy_at[k], tuned[k], k, sweep_as_text(accuracy_at))


def _linear(
    recipe: EvaluateRecipe, place: Place, train: Table, val: Table, classes: int, device: torch.device
) -> Score:
    x, labels, first = train.features[place], train.labels, train.first
    keys: Any = {"device": device, "max_iterations": recipe.linear.max_iterations}
    decays = recipe.linear.weight_decay
    tuned = linear.accuracies(x[:first], labels[:first], x[first:], labels[first:], classes, decays, **keys)
    decay = best_setting(tuned, smaller=False)
    fitted = linear.fit(x, labels, classes, decay, **keys)
    accuracy = float((fitted.predict(val.features[place]) == val.labels).mean())
    return Score("linear", *place, accuracy, tuned[decay], decay, sweep_as_text(tuned))


def _attentive(recipe: EvaluateRecipe, data: Data, tokens: Any, classes: int, device: torch.device) -> list[Score]:
    """Train attentive probes for all layers and learning rates at once, and judge the best of each layer.

    The best learning rate of each layer is chosen on the tune part. A probe with it is then trained on all training
    images.
    """
    keys = recipe.attentive

    def trained(numbers: np.ndarray, wanted: list[tuple[str, float]], what: str) -> list[Any]:
        torch.manual_seed(torch_seed(recipe.seed, Purpose.PROBE))
        probes = [(layer, lr, attentive.AttentiveProbe(dims[layer], classes).to(device)) for layer, lr in wanted]

        began = time.monotonic()

        def epoch_of(epoch: int) -> Iterator[Any]:
            left = (
                f", {format_duration((time.monotonic() - began) / epoch * (keys.epochs - epoch))} left" if epoch else ""
            )
            progress = f"{what}, epoch {epoch + 1} of {keys.epochs}{left}"
            return tokens(data.train, stream(recipe.seed, Purpose.PROBE, epoch).permutation(numbers), progress)

        steps = -(-len(numbers) // keys.batch_size)
        attentive.train(probes, epoch_of, epochs=keys.epochs, steps_per_epoch=steps, weight_decay=keys.weight_decay)
        return probes

    first, _ = next(iter(tokens(data.train, data.fit[:1], "one image")))
    dims = {layer: x.shape[-1] for layer, x in first.items()}
    probes = trained(data.fit, [(layer, lr) for layer in dims for lr in keys.lr], "attentive, choosing")
    right, images = attentive.count_correct(probes, tokens(data.train, data.tune, "attentive, choosing"))
    sweeps: dict[str, dict[float, float]] = {layer: {} for layer in dims}
    for (layer, lr, _), correct in zip(probes, right, strict=True):
        sweeps[layer][lr] = correct / max(images, 1)
    chosen = [(layer, best_setting(sweep, smaller=True)) for layer, sweep in sweeps.items()]
    probes = trained(np.concatenate([data.fit, data.tune]), chosen, "attentive")
    right, images = attentive.count_correct(
        probes, tokens(data.val, np.arange(len(data.val.labels)), "attentive, validation")
    )
    if images == 0:
        raise UserError("data.val: not one image can be read")
    return [
        Score("attentive", layer, "attention", n / images, sweeps[layer][lr], lr, sweep_as_text(sweeps[layer]))
        for (layer, lr, _), n in zip(probes, right, strict=True)
    ]
