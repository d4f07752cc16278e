"""Labeled images for fine-tuning: a folder with a folder for each class, shards with labels, or a CSV file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mpp.data.decode import decode_crop, decode_pillow, view_boxes
from mpp.data.files import read_manifest, read_regular
from mpp.data.images import ShardImages, evenly, holds_shards, images_of
from mpp.data.index import class_names, holds_both, packed_first
from mpp.data.walk import LeftOut, archives_in, is_hidden, list_images
from mpp.errors import BadImage, MppWarning, UserError
from mpp.rng import Purpose, stream, torch_seed

LOOKED_INTO = 16
"""Files whose bytes are part of a fingerprint."""


class Reader(Protocol):
    """Bytes, names and sizes in bytes of images, by number."""

    def read(self, i: int) -> bytes: ...
    def name(self, i: int) -> str: ...
    def sizes(self) -> np.ndarray: ...
    def fingerprint(self) -> str: ...


class FileReader:
    """Files of images."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def read(self, i: int) -> bytes:
        return read_regular(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i]

    def sizes(self) -> np.ndarray:
        return np.asarray([file_size(path) for path in self.paths], dtype=np.int64)

    def fingerprint(self) -> str:
        """Of names and sizes, and of what a few hold: arrays are all of one size."""
        digest = hashlib.sha256()
        for i in evenly(len(self.paths), LOOKED_INTO):
            with contextlib.suppress(OSError, BadImage):
                digest.update(self.read(i))
        return "\0".join([*(f"{os.path.basename(p)}:{file_size(p)}" for p in self.paths), digest.hexdigest()])


def file_size(path: str) -> int:
    """In bytes; -1 for what is not there."""
    try:
        return os.path.getsize(path)
    except OSError:  # a broken link: an image that cannot be read
        return -1


class PackedReader:
    """Images in shards. few: no more than a few of each shard will be read, for which remote ones are not fetched."""

    def __init__(self, images: ShardImages, *, few: bool = False) -> None:
        self.images, self.few = images, few
        self.first = np.concatenate([[0], np.cumsum(images.counts)])

    def at(self, i: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        return shard, i - int(self.first[shard])

    def read(self, i: int) -> bytes:
        return self.images.read(*self.at(i), few=self.few)

    def name(self, i: int) -> str:
        return self.images.name(*self.at(i))

    def sizes(self) -> np.ndarray:
        return np.concatenate([index.table[:, 1] for index in self.images.indexes])

    def fingerprint(self) -> str:
        return self.images.fingerprint


def sample(places: Sequence[str], count: int, key: str) -> Iterator[tuple[Reader, int]]:
    """`count` images, or as many as there are, evenly spread over all of them: whence, and their number there.

    places: shards, see `holds_shards`; image files; folders of images, however deep. UserError where there is nothing.
    """
    of_shards, of_files = (tuple(p for p in places if holds_shards(p) == wanted) for wanted in (True, False))
    packed = PackedReader(ShardImages(of_shards, key=key), few=True) if of_shards else None
    if packed and packed.images.left_out:
        warnings.warn(f"{key}: {packed.images.left_out}", MppWarning, stacklevel=3)
    files = FileReader(images_of(of_files))
    first = sum(packed.images.counts) if packed else 0
    total = first + len(files.paths)
    if total == 0:
        raise UserError(f"{key}: no images given")
    for at in evenly(total, count):
        yield (packed, at) if packed and at < first else (files, at - first)


@dataclass(frozen=True)
class Labeled:
    """Labeled images by number, in an order that does not depend on the machine."""

    reader: Reader
    labels: np.ndarray
    """(images,) int64, indexes into `classes`; or (images, classes) bool where an image may have several, or none"""
    classes: list[str]
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Files and members that are not among the images"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def strata(self) -> np.ndarray:
        """(images,) int64, what a part held out is stratified by: the class, where an image has one."""
        return np.zeros(len(self.labels), dtype=np.int64) if self.several else self.labels

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    def fingerprint(self) -> str:
        """What the images and their labels are, not where they lie."""
        words = (*self.classes, self.reader.fingerprint())
        return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape") + self.labels.tobytes()).hexdigest()

    def subset(self, *, labels_per_class: int | None, fraction: float | None, seed: int) -> np.ndarray:
        """Numbers of the images to train on, ascending: all, so many of each class, or a fraction of each.

        UserError where a class has fewer than `labels_per_class`.
        """
        if labels_per_class is None and (fraction is None or self.several):
            return draw_fraction(len(self.labels), fraction, seed)
        if self.several:
            raise UserError("data.labels_per_class: an image may have several labels here; allowed: data.fraction")
        rng, chosen = stream(seed, Purpose.SUBSET), []
        for label, name in enumerate(self.classes):
            members = np.flatnonzero(self.labels == label)
            take = labels_per_class or max(round(len(members) * (fraction or 0)), 1)
            if take > len(members):
                raise UserError(f"data.labels_per_class: {take}, but class '{name}' has {len(members)} images")
            chosen.append(rng.permutation(members)[:take])
        return np.sort(np.concatenate(chosen))


def draw_fraction(images: int, fraction: float | None, seed: int) -> np.ndarray:
    """Numbers of so large a part of all images, one at least, ascending; None: all."""
    if fraction is None:
        return np.arange(images)
    return np.sort(stream(seed, Purpose.SUBSET).permutation(images)[: max(round(images * fraction), 1)])


def split(strata: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, tune): places in `strata`, ascending; of each, `fraction` is for tuning and one at least for fitting.

    A pure function of its arguments.
    """
    rng, tune = stream(seed, Purpose.TUNE), []
    for label in np.unique(strata):
        members = np.flatnonzero(strata == label)
        take = min(max(round(fraction * len(members)), 1), len(members) - 1)
        tune.append(rng.permutation(members)[:take])
    chosen = np.sort(np.concatenate(tune))
    return np.setdiff1d(np.arange(len(strata)), chosen), chosen


def balanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """Places in `labels`, with repetitions, such that every class that occurs comes as often as the largest does.

    Members of a class come equally often, but for the last round, which is drawn.
    """
    rng, most, chosen = stream(seed, Purpose.BALANCE), np.bincount(labels).max(), []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rounds, rest = divmod(most, len(members))
        chosen += [np.tile(members, rounds), rng.permutation(members)[:rest]]
    return np.sort(np.concatenate(chosen))


def open_labeled(
    spec: tuple[str, ...],
    *,
    key: str,
    classes: list[str] | None,
    cache_dir: str | None,
    cache_limit_bytes: float,
    image_extension: str | None = None,
    several: bool = False,
) -> Labeled:
    """A class-folder tree, shards with `.cls` / `.json` labels (a folder that holds *.tar is shards), or a CSV file.

    classes: those of the training data, which validation must share. image_extension: which member of a sample is its
    image, see `samples_among`. several: an image may have several labels, or none. UserError where labels are missing.
    """
    if manifests := [place for place in spec if place.lower().endswith(".csv")]:
        if len(spec) > 1:
            raise UserError(f"{key}: {', '.join(spec)}: labels are read from one CSV file, and nothing beside it")
        rows = _read_csv(manifests[0], several)
        reader = FileReader([image for _, image, _ in rows])
        where = [f"{manifests[0]}:{line}" for line, _, _ in rows]
        return _named(reader, [names for *_, names in rows], where, key, classes, several)
    if len(spec) == 1 and os.path.isdir(spec[0]) and not archives_in(spec[0]):
        found = _folder(spec[0], key, classes)
        if several:
            return replace(found, labels=np.eye(len(found.classes), dtype=bool)[found.labels])
        return found
    for place in spec:  # class folders beside their archive
        if os.path.isdir(place) and (archives := archives_in(place)) and (unpacked := list_images(place)[0]):
            raise UserError(holds_both(key, place, archives, unpacked))
    images = ShardImages(
        spec, key=key, cache_dir=cache_dir, cache_limit_bytes=cache_limit_bytes, image_extension=image_extension
    )
    images.require(range(len(images.names)), "labeled images are read in no order: that takes")
    packed = PackedReader(images)
    if several:
        numbers = [(shard, row) for shard, count in enumerate(images.counts) for row in range(count)]
        places = [images.name(*at) for at in numbers]
        found = _named(packed, [_labels(images, *at) for at in numbers], places, key, classes, several)
        return replace(found, left_out=images.left_out)
    values = [_label(images, shard, row) for shard, count in enumerate(images.counts) for row in range(count)]
    # what `mpp pack` left in each folder: the numbers in the shards of a folder count in its own list
    folders = [os.path.dirname(name) for name in images.names]
    listed = {folder: class_names(folder) for folder in dict.fromkeys(folders)}
    named = [names for names in listed.values() if names is not None]
    known = classes
    if known is None:
        known = named[0] if len(named) == 1 else sorted(set().union(*named)) if named else _classes_of(values, key)
    index = {name: i for i, name in enumerate(known)}
    labels = []
    for i, value in enumerate(values):
        name = value if isinstance(value, str) else str(value)
        own = listed[folders[packed.at(i)[0]]]
        if own is not None and isinstance(value, int):
            name = own[value] if value < len(own) else f"{value}, beyond the {len(own)} of dataset.json"
        if name not in index:
            raise UserError(
                f"{key}: {packed.name(i)}: label {name!r} is none of the {len(known)} classes of the training data"
            )
        labels.append(index[name])
    return Labeled(packed, np.array(labels, dtype=np.int64), known, images.left_out)


def _classes_of(values: list[str | int], key: str) -> list[str]:
    """Class names of training data that has no list of them: the names it uses, or the numbers 0 to the largest."""
    numbers = [v for v in values if isinstance(v, int)]
    if len(numbers) < len(values):
        return sorted({str(v) for v in values})
    if max(numbers) >= 1000 + 10 * len(set(numbers)):  # ids, not class numbers; a guess
        raise UserError(
            f"{key}: labels up to {max(numbers)}, but only {len(set(numbers))} different ones: number classes from 0"
        )
    return [str(n) for n in range(max(numbers) + 1)]


def _read_csv(path: str, several: bool) -> list[tuple[int, str, list[str]]]:
    """(line, image file, names of its classes) of each row. UserError with the line of what is wrong."""
    column = "labels" if several else "label"
    rows = read_manifest(path, ["image", column])
    if several:
        _check_separator(path, [(number, row[column]) for number, row in rows])
    found, first = [], dict[str, tuple[int, list[str]]]()
    for number, row in rows:
        value, image = row[column], row["image"]
        if not value and not several:
            raise UserError(f"{path}:{number}: no label")
        names = [name.strip() for name in value.split(";") if name.strip()] if several else [value]
        line, before = first.setdefault(image, (number, names))
        if before != names:
            raise UserError(
                f"{path}:{number}: {image} a second time with another label, {', '.join(names) or 'none'}; line {line} "
                f"says {', '.join(before) or 'none'}"
            )
        found.append((number, os.path.join(os.path.dirname(path), image), names))
    return found


def _check_separator(path: str, values: list[tuple[int, str]]) -> None:
    """UserError where labels seem to be separated by something else than a semicolon: all of a value would be one."""
    if any(";" in value for _, value in values):
        return
    for number, value in values:
        if found := re.search(r"[,|]", value):
            raise UserError(
                f"{path}:{number}: labels: '{value}': several labels are separated by ';', not by '{found[0]}'. If "
                "this is one label, end it with ';'"
            )


def _labels(images: ShardImages, shard: int, row: int) -> list[str]:
    """`labels` of a sample's .json: a list of names. UserError."""
    stored, name = images.read_label(shard, row), images.name(shard, row)
    try:
        values = json.loads(stored[0])["labels"] if stored is not None and stored[1] else None
    except (ValueError, KeyError, TypeError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in values):
        raise UserError(f"{name}: wants a .json beside it with 'labels', a list of names")
    return [class_name(str(value), name) for value in values]


def _named(
    reader: Reader,
    named: list[list[str]],
    places: list[str],
    key: str,
    classes: list[str] | None,
    several: bool,
) -> Labeled:
    """From the names of each image's classes. UserError, with its place, for one that is no class of the training."""
    if several and not any(named):
        raise UserError(f"{key}: not one image has a label; the first: {places[0]}")
    known = classes if classes is not None else sorted({name for names in named for name in names})
    index = {name: i for i, name in enumerate(known)}
    labels = np.zeros((len(named), len(known)), dtype=bool)
    for i, names in enumerate(named):
        for name in names:
            if name not in index:
                raise UserError(
                    f"{key}: {places[i]}: '{name}' is none of the {len(known)} classes of the training data"
                )
            labels[i, index[name]] = True
    return Labeled(reader, labels if several else labels.argmax(1).astype(np.int64), known)


def class_name(value: str, where: str) -> str:
    """Strip the name of a class. UserError for one that is empty, or holds what is no text."""
    name = value.strip().removeprefix("\ufeff")
    if not name:
        raise UserError(f"{where}: an empty label")
    if odd := [c for c in name if unicodedata.category(c) in ("Cc", "Cs")]:
        raise UserError(f"{where}: label {value!r} holds the character {odd[0]!r}, which is no text")
    return name


def stored_label(images: ShardImages, shard: int, row: int) -> str | int | None:
    """The label of an image in a shard, a number or a name; None if it has none. UserError for what is neither."""
    stored = images.read_label(shard, row)
    return None if stored is None else _parsed_label(*stored, where=images.name(shard, row))


def _label(images: ShardImages, shard: int, row: int) -> str | int:
    label = stored_label(images, shard, row)
    if label is None:
        why = f"; {images.left_out}" if images.left_out else ""
        raise UserError(f"{images.name(shard, row)}: no label beside it (.cls, or .json with a 'label'){why}")
    return label


def _parsed_label(data: bytes, is_json: bool, where: str) -> str | int:
    try:
        value = json.loads(data)["label"] if is_json else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: its {'.json' if is_json else '.cls'} is not text in UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: its .json has no 'label'") from None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{where}: a label is a whole number or a name; got {json.dumps(value)}")
    if isinstance(value, str):
        value = class_name(value, where)
        if re.fullmatch(r"-?(0|[1-9][0-9]{0,8})", value):  # 007 is a name, and another one than 7
            value = int(value)
    if isinstance(value, int) and value < 0:
        raise UserError(f"{where}: label {value} is negative")
    return value


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _of_parquet(folder: str, spec: str) -> str:
    """The end of a message about a folder without images: what to do if it holds Parquet files; else nothing."""
    return f"; {packed_first(spec)}" if any(Path(folder).rglob("*.parquet")) else ""


def _folder(spec: str, key: str, classes: list[str] | None) -> Labeled:
    found = sorted(n for n in _listed(spec) if os.path.isdir(os.path.join(spec, n)) and not is_hidden(n))
    if not found:
        what = "holds neither *.tar shards nor a folder for each class"
        raise UserError(f"{key}: {spec} {what}{_of_parquet(spec, spec)}")
    if found == ["images", "masks"]:
        raise UserError(f"{key}: {spec} holds images/ and masks/, for task: segment; wants a folder for each class")
    known = classes or found
    files, left_out = list_images(spec)
    members: dict[str, list[str]] = {name: [] for name in found}
    for path in files:
        if "/" in path:
            members[path.split("/", 1)[0]].append(os.path.join(spec, path))
        else:
            left_out.append((path, "in no folder of a class"))
    paths, labels = [], []
    for name, own in members.items():
        if own and name not in known:
            raise UserError(f"{key}: {spec}/{name}: no such class in the training data ({', '.join(known[:5])} …)")
        if not own and classes is None:
            reason = [(path, why) for path, why in left_out if path == name or path.startswith(f"{name}/")]
            why = _of_parquet(os.path.join(spec, name), spec) or (f"; {LeftOut.of(reason)}" if reason else "")
            raise UserError(f"{key}: {spec}/{name}: a class folder without images{why}")
        paths += own
        labels += [known.index(name) for _ in own]
    return Labeled(FileReader(paths), np.array(labels, dtype=np.int64), known, LeftOut.of(left_out))


@dataclass
class LabeledBatch:
    """One micro-batch of labeled images."""

    images: Any
    """(B, C, H, W) uint8; or a list of (C, h, w), where whole images are judged"""
    labels: Any
    """(B,) int64, or (B, classes) float32 where images may have several; (B, H, W) uint8 masks, a list of them where
    whole images are judged; or boxes, a dictionary of tensors for each image"""
    positions: Tensor
    """(B,) int64"""
    readable: Tensor
    """(B,) bool: False where an image could not be read, and pixels and label are zeros, or, of whole ones, left out"""
    bad: list[str]
    """A line for each file that could not be read"""
    replaced: int = 0
    """Training images in whose place another one stands"""

    def pin_memory(self) -> LabeledBatch:
        if isinstance(self.images, Tensor) and isinstance(self.labels, Tensor):
            self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


class LabeledDataset(Dataset[LabeledBatch]):
    """Augmented training images of a subset; keys are (position, 0, place in the subset).

    augment: PIL image -> (C, H, W) uint8, drawing from python's, numpy's and torch's global generators (as timm's
    transforms do); they are seeded for each sample from (seed, position). A bad image is replaced by the next
    of the subset. Of images that are not of 8 bit, which have a `value_range` in `decoding`: (bytes, a
    generator) -> (C, H, W) float32.
    """

    def __init__(self, data: Labeled, subset: np.ndarray, augment: Any, seed: int, **decoding: Any) -> None:
        self.data, self.subset, self.augment, self.seed, self.decoding = data, subset, augment, seed, decoding

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> LabeledBatch | UserError:
        try:
            samples = [self._sample(position, place) for position, _, place in keys]
        except UserError as error:
            return error
        images, numbers, passed_over = zip(*samples, strict=True)
        readable = torch.ones(len(keys), dtype=torch.bool)
        positions = torch.tensor([k[0] for k in keys])
        labels, bad = _of(self.data, list(numbers)), [line for lines in passed_over for line in lines]
        return LabeledBatch(torch.stack(images), labels, positions, readable, bad, sum(map(bool, passed_over)))

    def _sample(self, position: int, place: int) -> tuple[Tensor, int, list[str]]:
        """The image, augmented, its number, and a line for each unreadable one in whose place it stands."""
        bad: list[str] = []
        for step in range(len(self.subset)):
            number = int(self.subset[(place + step) % len(self.subset)])
            try:
                data = self.data.reader.read(number)
                if "value_range" in self.decoding:
                    return self.augment(data, stream(self.seed, Purpose.AUGMENT, position)), number, bad
                image = decode_pillow(data, **self.decoding)
            except BadImage as error:
                bad.append(f"{self.data.reader.name(number)}: {error}")
                continue
            seed = torch_seed(self.seed, Purpose.AUGMENT, position)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also asks every device: 0.6 ms
            return torch.as_tensor(self.augment(image)), number, bad
        raise UserError("data.train: not one of the chosen images can be read; the last: " + bad[-1])


def _of(data: Labeled, numbers: list[int]) -> Tensor:
    """Labels of these images."""
    found = torch.from_numpy(data.labels[numbers])
    return found.float() if data.several else found


class CentreDataset(Dataset[LabeledBatch]):
    """Central crops for evaluation; keys are numbers of images.

    views: 1 or 2: (B, C, H, W); 10: corners, too, (B, 5, C, H, W). Mirror images are left to the model's device.
    """

    def __init__(
        self, data: Labeled, size: tuple[int, int], fraction: float, *, views: int = 1, **decoding: Any
    ) -> None:
        self.data, self.size, self.boxes = data, size, view_boxes(views, size, fraction)
        self.decode = decoding

    def __getitems__(self, keys: list[int]) -> LabeledBatch | UserError:
        shape = (len(keys), len(self.boxes), self.decode["channels"], *self.size)
        images = torch.zeros(shape, dtype=torch.float32 if "value_range" in self.decode else torch.uint8)
        readable, bad = torch.ones(len(keys), dtype=torch.bool), []
        for i, number in enumerate(keys):
            try:
                data = self.data.reader.read(number)
                for view, box in enumerate(self.boxes):
                    images[i, view] = decode_crop(data, box, self.size, **self.decode)
            except BadImage as error:
                images[i], readable[i] = 0, False
                bad.append(f"{self.data.reader.name(number)}: {error}")
            except UserError as error:
                return error
        together = images[:, 0] if len(self.boxes) == 1 else images
        return LabeledBatch(together, _of(self.data, keys), torch.tensor(keys), readable, bad)
