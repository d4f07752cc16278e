"""What a frozen encoder's features are worth: three probes over layers and poolings, beside controls.

Nothing is chosen by the validation images: k, weight decay, learning rate and the best layer are, on a part of the
training images; then the probe is fitted to all of them and asked once.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpp import distributed, exporting
from mpp.data.labeled import CentreDataset, Labeled, open_labeled, split
from mpp.data.loader import batches
from mpp.diagnostics.plots import Level, Line, draw
from mpp.errors import MppWarning, UserError, one_line
from mpp.features import EncoderReader, PixelReader, Place, Read, Table, read_table
from mpp.metrics import duration, environment
from mpp.probes import ARMS, PROTOCOL, attentive, knn, linear
from mpp.recipe import EvaluateRecipe
from mpp.records import write_json, write_status
from mpp.rng import Purpose, stream, torch_seed
from mpp.runfolder import opened
from mpp.unreadable import check_images
from mpp.verdict import aligned

T = TypeVar("T")
RESULT = "result.json"
LINE_EVERY_S = 10.0
"""Between lines of progress, if there is no terminal for a bar."""
PLOT = "evaluation.png"
FEW = 200
"""Images by which a choice is partly chance: an accuracy of one half is known to 7 points (95 %) by so many."""


@dataclass(frozen=True)
class Score:
    """One probe at one place."""

    probe: str
    layer: str
    pool: str
    accuracy: float
    """On the validation images."""
    tune_accuracy: float
    """On the part of the training images by which things are chosen."""
    chosen: float
    """k, weight decay or learning rate."""
    sweep: dict[str, float]
    """k -> validation accuracy; weight decay or learning rate -> tune accuracy."""

    @property
    def place(self) -> Place:
        return Place(self.layer, self.pool)


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` returns."""

    out: Path
    scores: dict[str, list[Score]]
    """Arm ("encoder", "compare", "random", "pixels") -> all its scores."""
    chance: float
    """Accuracy of always saying the most frequent class of the validation images."""
    plot: Path
    chosen_by: int
    """Training images held out, by which layer and values were chosen."""

    def best(self, arm: str, probe: str) -> Score | None:
        """The score at the place that was best on the tune part; None where this arm was not probed so."""
        found = [s for s in self.scores.get(arm, []) if s.probe == probe]
        return max(found, key=lambda s: s.tune_accuracy) if found else None

    def table(self) -> str:
        """For people."""
        probes = list(dict.fromkeys(s.probe for scores in self.scores.values() for s in scores))
        rows = [["", *probes]]
        for arm in self.scores:
            cells = [self.best(arm, probe) for probe in probes]
            rows.append([ARMS[arm], *(f"{100 * s.accuracy:.1f} %  {s.place}" if s else "-" for s in cells)])
        rows.append(["the most frequent class", *[f"{100 * self.chance:.1f} %"] * len(probes)])
        lines = aligned(rows)
        for probe in probes:
            own = self.best("encoder", probe)
            for arm in ("random", "pixels"):
                control = self.best(arm, probe)
                if own and control and own.accuracy <= control.accuracy:
                    lines.append(f"{probe}: the encoder's features are no better than {ARMS[arm]} here")
        if "linear" in probes:
            lines.append(PROTOCOL)
        if self.chosen_by < FEW:
            lines.append(
                f"layers and values were chosen by {self.chosen_by} held-out training images: partly by chance"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Arm:
    """What one encoder, or control, got."""

    scores: list[Score]
    judged: list[int]
    """Validation images of each class that could be read"""
    unreadable: list[str]
    """A line for each image, of both parts, that could not be read"""


@dataclass
class _Data:
    """Labeled images in the parts that the probes need."""

    train: Labeled
    val: Labeled
    fit: np.ndarray
    """Numbers of the training images that probes are fitted to while something is chosen…"""
    tune: np.ndarray
    """… and of those by which it is chosen."""


def evaluate(recipe: EvaluateRecipe, resume: str = "never") -> EvaluateResult:
    """Run a recipe. resume: "never" (the run folder must be new) or "auto" (arms that are done are kept).

    UserError for everything the user can correct.
    """
    recipe = recipe.model_copy(update={"data": exporting.read_as(recipe.encoder, recipe.data, warn=True)})
    if resume not in ("never", "auto"):
        raise UserError(f"--resume {resume}: each arm has a result of its own; allowed: auto, never")
    accelerator = distributed.start(recipe.precision)
    if accelerator.num_processes > 1:
        raise UserError(f"evaluate runs in one process; got {accelerator.num_processes}")
    data = _open(recipe)
    for key in ("encoder", "compare"):
        if source := getattr(recipe, key):
            exporting.check_source(source, key=key)
    readers = {arm: None if arm == "pixels" else _reader(recipe, arm) for arm in _arms(recipe)}  # refuses before work
    sizes = {arm: reader.size for arm, reader in readers.items() if reader is not None}
    fingerprint = _fingerprint(recipe, data)
    with opened(accelerator, recipe, resume, fingerprint=fingerprint), distributed.ending_on_signals():
        try:
            return _evaluate(recipe, accelerator, data, readers, sizes, fingerprint)
        except (KeyboardInterrupt, SystemExit) as end:
            number = end.code - 128 if isinstance(end, SystemExit) and isinstance(end.code, int) else signal.SIGINT
            with suppress(OSError):
                write_status(Path(recipe.out), "stopped", why=signal.Signals(number).name)
            print("stopped; --resume auto keeps the arms that are done", flush=True)
            raise
        except BaseException as error:
            with suppress(OSError):  # a full disk, most likely
                write_status(Path(recipe.out), "failed", why=one_line(error) or type(error).__name__)
            raise


def _evaluate(
    recipe: EvaluateRecipe,
    accelerator: distributed.Accelerator,
    data: _Data,
    readers: dict[str, Any],
    sizes: dict[str, Any],
    fingerprint: str,
) -> EvaluateResult:
    out = Path(recipe.out)
    write_json(out / "env.json", environment())
    write_status(out, "running")
    arms: dict[str, _Arm] = {}
    took_s: list[float] = []
    for number, (arm, found) in enumerate(readers.items()):
        folder = out / "arms" / arm
        done = _finished(folder, fingerprint)
        if done is None:
            began, left = time.monotonic(), len(readers) - number
            pace = f", about {duration(sum(took_s) / len(took_s) * left)} left" if took_s else ""
            print(f"arm {number + 1} of {len(readers)}: {arm}{pace}", flush=True)
            write_status(out, "running", arm=arm, number=number + 1, of=len(readers))
            size = found.size if found else sizes["encoder"]
            reader = found.reader if found else PixelReader()
            done = _run_arm(recipe, accelerator, reader.to(accelerator.device), data, size, folder)
            reader.cpu()
            write_json(folder / RESULT, {"fingerprint": fingerprint, **asdict(done)})
            took_s.append(time.monotonic() - began)
        arms[arm] = done

    own = arms["encoder"]
    lost = [name for name, judged in zip(data.val.classes, own.judged, strict=True) if not judged]
    lost = sorted(set(lost) & {data.val.classes[label] for label in data.val.labels})
    if own.unreadable:
        of_classes = f"; not one of {', '.join(lost)} in data.val" if lost else ""
        what = f"{len(own.unreadable)} images could not be read and are left out, such as {own.unreadable[0]}"
        warnings.warn(f"{what}{of_classes}", MppWarning, stacklevel=3)
    scores = {arm: found.scores for arm, found in arms.items()}
    result = EvaluateResult(out, scores, max(own.judged) / sum(own.judged), out / PLOT, len(data.tune))
    _plot(result)
    best = {
        arm: {probe: asdict(s) for probe in recipe.probes if (s := result.best(arm, probe))} for arm in result.scores
    }
    write_json(
        out / RESULT,
        {
            "best": best,
            "chance": result.chance,
            "chosen_by": result.chosen_by,
            "train_images": len(data.fit) + len(data.tune),
            "val_images": len(data.val.labels),
            "val_images_read": sum(own.judged),
            "unreadable": own.unreadable,
            "unread_classes": lost,
            "scores": {arm: [asdict(s) for s in found] for arm, found in scores.items()},
        },
    )
    write_status(out, "finished")
    return result


def _arms(recipe: EvaluateRecipe) -> list[str]:
    return ["encoder", *(["compare"] if recipe.compare else []), *(["random", "pixels"] if recipe.controls else [])]


def _open(recipe: EvaluateRecipe) -> _Data:
    keys = recipe.data
    train = open_labeled(keys.train, key="data.train", classes=None, **keys.opening())
    val = open_labeled(keys.val, key="data.val", classes=train.classes, **keys.opening())
    if len(val.labels) == 0:
        raise UserError(f"data.val: no images in {', '.join(keys.val)}")
    if len(train.classes) < 2:
        raise UserError(f"data.train: only one class ({train.classes[0]}); at least two are needed")
    if train.fingerprint() == val.fingerprint():
        raise UserError("data.val: the same images as data.train; the accuracy would say nothing")
    chosen = train.subset(labels_per_class=keys.labels_per_class, fraction=keys.fraction, seed=recipe.seed)
    fit, tune = split(train.strata[chosen], recipe.tune_fraction, recipe.seed)
    if len(tune) == 0:
        raise UserError("data.train: to choose by, some class needs two images at least")
    for key, images in (("data.train", train), ("data.val", val)):
        for doubt in check_images(images, key, keys.decoding(), keys.max_bad_fraction):
            warnings.warn(doubt, MppWarning, stacklevel=4)
    return _Data(train, val, chosen[fit], chosen[tune])


@dataclass
class _Opened:
    """An encoder and the size of its images."""

    reader: nn.Module
    size: tuple[int, int]


def _reader(recipe: EvaluateRecipe, arm: str) -> _Opened:
    """UserError where the encoder cannot be had so."""
    data = recipe.data
    torch.manual_seed(torch_seed(recipe.seed, Purpose.INIT))
    source = recipe.compare if arm == "compare" else recipe.encoder
    assert source is not None
    model: Any = exporting.open_encoder(
        source,
        architecture=None if arm == "compare" else recipe.architecture,
        image_size=data.image_size,
        channels=data.channels,
        pretrained=arm != "random",
    )
    own = model.pretrained_cfg
    size = data.image_size or tuple(own["input_size"][1:])
    exporting.check_size(model, size, source)
    mean, std = (getattr(data, k) or exporting.for_channels(own[k], data.channels) for k in ("mean", "std"))
    return _Opened(EncoderReader(model, recipe.layers, mean, std), (int(size[0]), int(size[1])))


def _fingerprint(recipe: EvaluateRecipe, data: _Data) -> str:
    """What is read, and by what weights."""
    return exporting.fingerprint(data.train.fingerprint(), data.val.fingerprint(), recipe.encoder, recipe.compare)


def _finished(folder: Path, fingerprint: str) -> _Arm | None:
    """An arm that is done. UserError where it is of other data or weights."""
    try:
        stored = json.loads((folder / RESULT).read_text())
        found = _Arm([Score(**s) for s in stored["scores"]], stored["judged"], stored["unreadable"])
        before = stored["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if before != fingerprint:
        raise UserError(f"{folder}: the data or the encoder changed since; start a new run")
    return found


def _run_arm(
    recipe: EvaluateRecipe, accelerator: Any, reader: nn.Module, data: _Data, size: tuple[int, int], folder: Path
) -> _Arm:
    """Every probe at every place of one encoder."""
    device, scores = accelerator.device, list[Score]()
    keys, classes = recipe.data, len(data.train.classes)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
    progress = _Progress()
    judged, unreadable = np.bincount(data.val.labels, minlength=classes), list[str]()

    def images(
        of: Labeled, numbers: np.ndarray, batch_size: int, what: str, *, time_left: bool = True
    ) -> Iterator[Any]:
        dataset = CentreDataset(of, size, keys.val_crop_fraction, **keys.decoding())
        parts = [numbers[i : i + batch_size].tolist() for i in range(0, len(numbers), batch_size)]
        loaded = batches(dataset, parts, workers=keys.workers, pin_memory=device.type == "cuda")
        yield from progress.shown(loaded, f"{folder.name}: {what}, batch", len(parts), time_left=time_left)

    def read(pixels: Tensor, *, tokens: bool = False) -> Read:
        """In the run's precision, and only this: whatever is trained on it is trained in float32."""
        with accelerator.autocast():
            return reader(pixels, tokens=tokens)

    # ---- features, read once
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
            raise UserError(f"data.{key}: not one image can be read; the first: {unreadable[0]}")
        for place in progress.shown(train.features, f"{folder.name}: probes, layer and pooling", len(train.features)):
            if "knn" in recipe.probes:
                scores.append(_knn(recipe, place, train, val, classes, device))
            if "linear" in recipe.probes:
                scores.append(_linear(recipe, place, train, val, classes, device))
        if not recipe.keep_features:
            del train, val  # unmapped before they are deleted
            shutil.rmtree(folder / "features")

    # ---- tokens, read in every epoch
    if "attentive" in recipe.probes and isinstance(reader, EncoderReader):
        unread, unread_val = dict.fromkeys(unreadable), set[int]()

        def tokens(of: Labeled, numbers: np.ndarray, what: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for batch in images(of, numbers, recipe.attentive.batch_size, what, time_left=False):
                readable = batch.readable.to(device)
                unread.update(dict.fromkeys(batch.bad))
                if of is data.val:
                    unread_val.update(batch.positions[~batch.readable].tolist())
                found = read(batch.images.to(device), tokens=True)
                yield {k: v[readable] for k, v in found.tokens.items()}, batch.labels.to(device)[readable]

        scores += _attentive(recipe, data, tokens, classes, device)
        unreadable = list(unread)
        judged = np.bincount(np.delete(data.val.labels, sorted(unread_val)), minlength=classes)
    folder.mkdir(parents=True, exist_ok=True)
    return _Arm(scores, judged.tolist(), unreadable)


class _Progress:
    """How far an arm is: bars on a terminal, else a line every LINE_EVERY_S, however short the loops are."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def shown(self, items: Iterable[T], what: str, total: int, *, time_left: bool = True) -> Iterator[T]:
        """The same items. time_left: of this loop; not if it is one of many."""
        if sys.stderr.isatty():
            yield from tqdm(items, what, total, leave=False)
            return
        began = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - self.last >= LINE_EVERY_S:
                self.last = now
                left = f", {duration((now - began) / done * (total - done))} left" if time_left else ""
                print(f"{what} {done} of {total}{left}", flush=True)


def _knn(recipe: EvaluateRecipe, place: Place, train: Table, val: Table, classes: int, device: torch.device) -> Score:
    x, labels, first = train.features[place], train.labels, train.first
    ks = recipe.knn.k
    tuned = knn.accuracies(x[:first], labels[:first], x[first:], labels[first:], ks, classes, device)
    k = _best(tuned, smaller=True)
    found = knn.accuracies(x, labels, val.features[place], val.labels, sorted({*ks, k}), classes, device)
    return Score("knn", *place, found[k], tuned[k], k, _named(found))


def _linear(
    recipe: EvaluateRecipe, place: Place, train: Table, val: Table, classes: int, device: torch.device
) -> Score:
    x, labels, first = train.features[place], train.labels, train.first
    keys: Any = {"device": device, "max_iterations": recipe.linear.max_iterations}
    tuned: dict[float, float] = {}
    fitted = None
    for decay in sorted(recipe.linear.weight_decay, reverse=True):  # from strong to weak, each from the one before
        fitted = linear.fit(x[:first], labels[:first], classes, decay, start=fitted, **keys)
        tuned[decay] = float((fitted.predict(x[first:]) == labels[first:]).mean())
    decay = _best(tuned, smaller=False)
    fitted = linear.fit(x, labels, classes, decay, **keys)
    accuracy = float((fitted.predict(val.features[place]) == val.labels).mean())
    return Score("linear", *place, accuracy, tuned[decay], decay, _named(tuned))


def _attentive(recipe: EvaluateRecipe, data: _Data, tokens: Any, classes: int, device: torch.device) -> list[Score]:
    """A probe for each layer and learning rate, all trained at once; then the best of each layer again, on all."""
    keys = recipe.attentive

    def trained(numbers: np.ndarray, wanted: list[tuple[str, float]], what: str) -> list[Any]:
        torch.manual_seed(torch_seed(recipe.seed, Purpose.PROBE))
        probes = [(layer, lr, attentive.AttentiveProbe(dims[layer], classes).to(device)) for layer, lr in wanted]

        began = time.monotonic()

        def epoch_of(epoch: int) -> Iterator[Any]:
            left = f", {duration((time.monotonic() - began) / epoch * (keys.epochs - epoch))} left" if epoch else ""
            said = f"{what}, epoch {epoch + 1} of {keys.epochs}{left}"
            return tokens(data.train, stream(recipe.seed, Purpose.PROBE, epoch).permutation(numbers), said)

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
    chosen = [(layer, _best(sweep, smaller=True)) for layer, sweep in sweeps.items()]
    probes = trained(np.concatenate([data.fit, data.tune]), chosen, "attentive")
    right, images = attentive.count_correct(
        probes, tokens(data.val, np.arange(len(data.val.labels)), "attentive, validation")
    )
    if images == 0:
        raise UserError("data.val: not one image can be read")
    return [
        Score("attentive", layer, "attention", n / images, sweeps[layer][lr], lr, _named(sweeps[layer]))
        for (layer, lr, _), n in zip(probes, right, strict=True)
    ]


def _best(sweep: dict[Any, float], *, smaller: bool) -> Any:
    """What has the highest accuracy; of equals the smaller, or the larger."""
    return max(sweep, key=lambda value: (sweep[value], -value if smaller else value))


def _named(sweep: dict[Any, float]) -> dict[str, float]:
    """With keys that JSON can hold."""
    return {f"{value:g}": accuracy for value, accuracy in sweep.items()}


def _plot(result: EvaluateResult) -> None:
    panels: dict[str, list[Line | Level]] = {}
    for arm, scores in result.scores.items():
        for probe in dict.fromkeys(s.probe for s in scores):
            panel = panels.setdefault(probe, [])
            for pool in dict.fromkeys(s.pool for s in scores if s.probe == probe):
                own = [s for s in scores if s.probe == probe and s.pool == pool]
                if pool == "own":
                    panel += [Level(f"{arm}, {s.layer}" if arm != s.layer else arm, 100 * s.accuracy) for s in own]
                else:
                    name = f"{arm}, {pool}"
                    x, y = [float(s.layer) for s in own], [100 * s.accuracy for s in own]
                    panel.append(Line(name, x, y, dashed=arm == "random"))
    draw(panels, result.plot, xlabel="layer", ylabel="accuracy, %")
