"""Open labeled images for fine-tuning: a tree of class folders, shards with labels, or a CSV file."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field, replace

import numpy as np

from mpp.data.class_labels import classes_of_parquet, listed_classes, read_label, read_labels
from mpp.data.files import read_manifest
from mpp.data.readers import FileReader, PackedReader, Reader
from mpp.data.shards.index import class_names, holds_both
from mpp.data.shards.reader import ShardImages
from mpp.data.subsets import draw_fraction
from mpp.data.walk import LeftOut, archives_in, is_hidden, list_images
from mpp.errors import UserError
from mpp.rng import Purpose, stream


@dataclass(frozen=True)
class Labeled:
    """Labeled images by number, in an order that does not depend on the machine."""

    reader: Reader
    labels: np.ndarray
    """(images,) int64, indexes into `classes`. (images, classes) bool if an image may have several labels, or none."""
    classes: list[str]
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Files and members that are not among the images."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def strata(self) -> np.ndarray:
        """Stratum of each image for a held-out split, (images,) int64: its class, or 0 if it may have several."""
        return np.zeros(len(self.labels), dtype=np.int64) if self.several else self.labels

    def class_of_each(self) -> np.ndarray | None:
        """Return the class of each image, (images,) int64; None if an image may have several."""
        return None if self.several else self.labels

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    def fingerprint(self) -> str:
        """Return a hash of the images and their labels. Their location does not change it."""
        words = (*self.classes, self.reader.fingerprint())
        return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape") + self.labels.tobytes()).hexdigest()

    def subset(self, *, labels_per_class: int | None, fraction: float | None, seed: int) -> np.ndarray:
        """Return the numbers of the images to train on, ascending.

        Args:
            labels_per_class: Number of images of each class. None means no such limit.
            fraction: Fraction of each class, or of all images if an image may have several labels. None means all.
            seed: Seed of the draw.

        Raises:
            UserError: If a class has fewer than `labels_per_class` images, or images may have several labels.
        """
        if labels_per_class is None and (fraction is None or self.several):
            return draw_fraction(len(self.labels), fraction, seed)
        if self.several:
            raise UserError("data.labels_per_class: an image may have several labels here; use data.fraction")
        rng, chosen = stream(seed, Purpose.SUBSET), []
        for label, name in enumerate(self.classes):
            members = np.flatnonzero(self.labels == label)
            take = labels_per_class or max(round(len(members) * (fraction or 0)), 1)
            if take > len(members):
                raise UserError(f"data.labels_per_class: {take}, but class '{name}' has {len(members)} images")
            chosen.append(rng.permutation(members)[:take])
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
    """Open a tree of class folders, shards with labels (.cls, .json), or a CSV file.

    A folder that holds *.tar files is read as shards.

    Args:
        spec: Places in the recipe.
        key: Recipe key, for messages.
        classes: Classes of the training data, which validation must share. None means the classes of the data itself.
        cache_dir: Cache folder of remote shards. None means the default.
        cache_limit_bytes: Greatest size of all cached shards.
        image_extension: Extension of the member that is a sample's image, see `samples_among`.
        several: Whether an image may have several labels, or none.

    Raises:
        UserError: If labels are missing or name no class.
    """
    if manifests := [place for place in spec if place.lower().endswith(".csv")]:
        if len(spec) > 1:
            raise UserError(f"{key}: {', '.join(spec)}: labels are read from one CSV file, and nothing beside it")
        rows = _read_csv(manifests[0], several)
        reader = FileReader([image for _, image, _ in rows])
        where = [f"{manifests[0]}:{line}" for line, _, _ in rows]
        return _named(reader, [names for *_, names in rows], where, key, classes, several)
    if len(spec) == 1 and os.path.isdir(spec[0]) and not archives_in(spec[0]):
        labeled = _folder(spec[0], key, classes)
        if several:
            return replace(labeled, labels=np.eye(len(labeled.classes), dtype=bool)[labeled.labels])
        return labeled
    for place in spec:  # for example class folders next to the archive they came from
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
        labeled = _named(packed, [read_labels(images, *at) for at in numbers], places, key, classes, several)
        return replace(labeled, left_out=images.left_out)
    values = [read_label(images, shard, row) for shard, count in enumerate(images.counts) for row in range(count)]
    # Class names that `mpp pack` wrote: label numbers in the shards of a folder refer to the list in that folder.
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
        classes_here = listed[folders[packed.at(i)[0]]]
        if classes_here is not None and isinstance(value, int):
            known_here = value < len(classes_here)
            name = classes_here[value] if known_here else f"{value}, beyond the {len(classes_here)} of dataset.json"
        if name not in index:
            raise UserError(
                f"{key}: {packed.name(i)}: label {name!r} is none of the {len(known)} classes of the training data"
            )
        labels.append(index[name])
    return Labeled(packed, np.array(labels, dtype=np.int64), known, images.left_out)


def _classes_of(values: list[str | int], key: str) -> list[str]:
    """Return the classes of training data without a list: the names in use, or the numbers from 0 to the largest."""
    numbers = [v for v in values if isinstance(v, int)]
    if len(numbers) < len(values):
        return sorted({str(v) for v in values})
    if max(numbers) >= 1000 + 10 * len(set(numbers)):  # these are ids, not class numbers (a guess)
        raise UserError(
            f"{key}: labels up to {max(numbers)}, but only {len(set(numbers))} different ones: number classes from 0"
        )
    return [str(n) for n in range(max(numbers) + 1)]


def _read_csv(path: str, several: bool) -> list[tuple[int, str, list[str]]]:
    """Return (line, image file, names of its classes) of each row. Raise UserError with the line of a fault."""
    column = "labels" if several else "label"
    rows = read_manifest(path, ["image", column])
    if several:
        _check_separator(path, [(number, row[column]) for number, row in rows])
    labeled_rows, first = [], dict[str, tuple[int, list[str]]]()
    for number, row in rows:
        value, image = row[column], row["image"]
        if not value and not several:
            raise UserError(f"{path}:{number}: no label")
        names = [name.strip() for name in value.split(";") if name.strip()] if several else [value]
        line, before = first.setdefault(image, (number, names))
        if before != names:
            raise UserError(
                f"{path}:{number}: {image} is named twice, with different labels: "
                f"{', '.join(names) or 'none'}; line {line} has {', '.join(before) or 'none'}"
            )
        labeled_rows.append((number, os.path.join(os.path.dirname(path), image), names))
    return labeled_rows


def _check_separator(path: str, values: list[tuple[int, str]]) -> None:
    """Raise UserError if labels seem to be separated by other characters than semicolons.

    Otherwise the whole value would be read as one label.
    """
    if any(";" in value for _, value in values):
        return
    for number, value in values:
        if separator := re.search(r"[,|]", value):
            raise UserError(
                f"{path}:{number}: labels: '{value}': several labels are separated by ';', not by '{separator[0]}'. If "
                "this is one label, end it with ';'"
            )


def _named(
    reader: Reader,
    named: list[list[str]],
    places: list[str],
    key: str,
    classes: list[str] | None,
    several: bool,
) -> Labeled:
    """Make labels from the names of each image's classes.

    Args:
        reader: Reader of the images.
        named: Names of the classes of each image.
        places: Place of each image, for messages.
        key: Recipe key, for messages.
        classes: Classes of the training data. None means the names that occur, sorted.
        several: Whether an image may have several labels, or none.

    Raises:
        UserError: If a name is not a class of the training data, or if no image has a label.
    """
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


def _folder(spec: str, key: str, classes: list[str] | None) -> Labeled:
    folder_names = sorted(n for n in listed_classes(spec) if os.path.isdir(os.path.join(spec, n)) and not is_hidden(n))
    if not folder_names:
        what = "holds neither *.tar shards nor a folder for each class"
        raise UserError(f"{key}: {spec} {what}{classes_of_parquet(spec, spec)}")
    if folder_names == ["images", "masks"]:
        raise UserError(f"{key}: {spec} holds images/ and masks/, for task: segment; expected a folder for each class")
    known = classes or folder_names
    files, left_out = list_images(spec)
    members: dict[str, list[str]] = {name: [] for name in folder_names}
    for path in files:
        if "/" in path:
            members[path.split("/", 1)[0]].append(os.path.join(spec, path))
        else:
            left_out.append((path, "in no folder of a class"))
    paths, labels = [], []
    for name, of_class in members.items():
        if of_class and name not in known:
            raise UserError(f"{key}: {spec}/{name}: no such class in the training data ({', '.join(known[:5])} …)")
        if not of_class and classes is None:
            reason = [(path, why) for path, why in left_out if path == name or path.startswith(f"{name}/")]
            why = classes_of_parquet(os.path.join(spec, name), spec) or (f"; {LeftOut.of(reason)}" if reason else "")
            raise UserError(f"{key}: {spec}/{name}: a class folder without images{why}")
        paths += of_class
        labels += [known.index(name) for _ in of_class]
    return Labeled(FileReader(paths), np.array(labels, dtype=np.int64), known, LeftOut.of(left_out))
