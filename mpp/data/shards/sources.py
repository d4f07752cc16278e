"""Sources of images for `mpp pack`: a folder, a CSV file, Parquet files in Hugging Face's layout, or tar shards."""

from __future__ import annotations

import bisect
import glob
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from braceexpand import braceexpand

from mpp.data.class_labels import stored_label
from mpp.data.files import read_manifest, read_regular
from mpp.data.readers import PackedReader
from mpp.data.shards.index import class_names
from mpp.data.shards.reader import ShardImages
from mpp.data.shards.remote import is_remote, list_files, open_in_parts
from mpp.data.walk import LeftOut, archives_in, list_images
from mpp.errors import BadImage, UserError, how_to_get
from mpp.recipe.values import IMAGE_ENDINGS
from mpp.rng import Purpose, stream

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "pixel_values", "image_bytes", "bytes")
MOST_CLASSES = 1_000_000
"""Greatest number of classes if no list names them (a guess)."""
MOST_NAMED, FEW_NAMES = 0.5, 100
"""Texts are captions, not classes, if the number of different texts exceeds both this share of the images and this
number (a guess)."""
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "cls")
"""Usual names of label columns in Parquet files, likeliest first."""

Sample = tuple[str, bytes | str, int | str | None]
"""(place in the source, bytes of the image or the reason why there are none, label)."""
ArrowSchema: TypeAlias = Any
ArrowTable: TypeAlias = Any
ArrowType: TypeAlias = Any
"""Types of pyarrow, which is imported only to read Parquet and has no type annotations."""


class Source(Protocol):
    """Images by number. A source is pickled for other processes."""

    @property
    def samples(self) -> int: ...

    @property
    def labeled(self) -> bool: ...

    classes: list[str]
    """Names of the classes. Empty if there are no labels, or if labels are numbers without names."""
    skipped: list[tuple[str, str]]
    """(name, reason) of each file or member that is not an image by its name."""
    identity: bytes
    """Names and numbers that distinguish this source from another one. Its location is not among them."""

    def read(self, first: int, end: int) -> Iterator[Sample]:
        """Yield the samples first … end - 1.

        Raises:
            UserError: If the source itself cannot be read.
        """
        ...


def open_source(source: str, *, labels: bool | None, seed: int, image_extension: str | None = None) -> Source:
    """Open the source that `mpp pack` is given.

    Args:
        image_extension: Extension of the member that is a sample's image in tar shards, see `samples_among`.

    Raises:
        UserError: If the source does not exist, has no images or lacks the requested labels.
    """
    if is_remote(source) and not _base(source).endswith(".tar"):
        return Parquet(_remote_parquet(source), labels)
    if os.path.isdir(source):
        if archives_in(source):
            return Shards(source, labels, image_extension)
        if (parquet := _parquet_below(source)) and not list_images(source)[0]:
            return Parquet(parquet, labels)
        return Files.of_folder(source, labels, seed)
    if source.lower().endswith(".csv"):
        return Files.of_manifest(source, labels, seed)
    matches = sorted(glob.glob(source)) if glob.has_magic(source) and not os.path.exists(source) else [source]
    if matches and all(match.endswith(".parquet") for match in matches):
        return Parquet(matches, labels)
    if _base(source).endswith(".tar") or "{" in source:
        return Shards(source, labels, image_extension)
    raise UserError(
        f"{source}: no such folder"
        if not os.path.exists(source)
        else f"{source}: neither a folder nor a .csv, .parquet or .tar file"
    )


def _parquet_below(folder: str) -> list[str]:
    """List the Parquet files below a folder, as `datasets` names them: data/train-00000-of-00010.parquet.

    Raise UserError if there are several splits.
    """
    files = [p for p in Path(folder).glob("**/*.parquet") if p.is_file()]
    shown = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return _of_one_split(folder, sorted(map(str, shown)))


def _of_one_split(folder: str, files: list[str]) -> list[str]:
    """Return the Parquet files of a folder. Raise UserError if their names are of several splits."""
    splits = {m[1] for p in files if (m := re.match(r"(train|test|validation|valid|val|dev)\b", os.path.basename(p)))}
    if len(splits) > 1:
        raise UserError(
            f"{folder}: holds the splits {', '.join(sorted(splits))}; give one of them, such as "
            f"'{os.path.dirname(files[0])}/{min(splits, key=lambda s: (s != 'train', s))}-*.parquet'"
        )
    return files


def _remote_parquet(place: str) -> list[str]:
    """Return the URLs of Parquet files, which are named by a URL with braces, a pattern or a folder.

    Raises:
        UserError: If there are none.
    """
    if _base(place).endswith(".parquet") and not glob.has_magic(urllib.parse.urlsplit(place).path):
        return list(braceexpand(place))
    files = list_files(place, ".parquet")
    if not files:
        on_hub = re.match(r"hf://datasets/[^/@]+/[^/@]+", place)
        hint = f"; the Hub may have made some: {on_hub[0]}@refs/convert/parquet" if on_hub else ""
        raise UserError(f"{place}: no Parquet files there{hint}")
    return files if glob.has_magic(place) else _of_one_split(place, files)


@dataclass
class Files:
    """Image files, in an order shuffled by a seed."""

    folder: str
    paths: list[str]
    """Paths below the folder, in the order in which they are packed."""
    labels: list[int] | None
    classes: list[str]
    identity: bytes
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def labeled(self) -> bool:
        return self.labels is not None

    @classmethod
    def of_folder(cls, source: str, labels: bool | None, seed: int) -> Files:
        """List the images of a folder. The first folder below `source` is the class of an image.

        If `labels` is None, images are labeled if each of them is in a class folder.
        """
        files, skipped = list_images(source)
        if not files:
            raise UserError(f"{source}: no images found (by name: {IMAGE_ENDINGS})" + _but(skipped))
        in_folders = all("/" in f for f in files)
        if labels and not in_folders:
            stray = next(f for f in files if "/" not in f)
            raise UserError(f"--labels: labels come from folder names, but {stray} is not in a subfolder of {source}")
        named = [f.split("/", 1)[0] for f in files] if (in_folders if labels is None else labels) else None
        return cls._mixed(source, files, named, seed, skipped)

    @classmethod
    def of_manifest(cls, source: str, labels: bool | None, seed: int) -> Files:
        """Read a CSV file with the columns `image` and, for labels, `label`. Paths are below the file's folder."""
        rows = read_manifest(
            source, ["image", "label"] if labels else ["image"], optional=[] if labels is False else ["label"]
        )
        named = [row["label"] for _, row in rows if "label" in row]
        if not all(named):
            raise UserError(f"{source}:{rows[named.index('')][0]}: no label; --no-labels leaves all of them out")
        return cls._mixed(os.path.dirname(source), [row["image"] for _, row in rows], named or None, seed, [])

    @classmethod
    def _mixed(
        cls, folder: str, files: list[str], named: list[str] | None, seed: int, skipped: list[tuple[str, str]]
    ) -> Files:
        classes = sorted(set(named)) if named else []
        numbers = {name: i for i, name in enumerate(classes)}
        order = stream(seed, Purpose.PACK).permutation(len(files)).tolist()
        labels = [numbers[named[n]] for n in order] if named else None
        identity = "\0".join(files).encode("utf-8", "surrogateescape")
        return cls(folder, [files[n] for n in order], labels, classes, identity, skipped)

    @property
    def samples(self) -> int:
        return len(self.paths)

    def read(self, first: int, end: int) -> Iterator[Sample]:
        for i in range(first, end):
            label = self.labels[i] if self.labels is not None else None
            try:
                yield self.paths[i], read_regular(os.path.join(self.folder, self.paths[i])), label
            except BadImage as error:
                yield self.paths[i], str(error), label


class Parquet:
    """Parquet files, in their order, with a column of image files: bytes, or a struct of bytes and path.

    Row groups are read one at a time. Only the columns of images and labels are read.
    """

    def __init__(self, files: list[str], labels: bool | None) -> None:
        parquet = import_parquet()
        self.files, self.skipped = files, list[tuple[str, str]]()
        self.image = self.label = ""
        self.classes: list[str] = []
        self.text = False
        """Whether the column of labels holds names instead of numbers."""
        self.groups: list[tuple[int, int]] = []
        """(number of the file, number of the row group in it) of each row group."""
        counts = []
        for number, file in enumerate(files):
            try:
                with _opened(parquet, file) as opened:
                    if not opened.metadata.num_rows:
                        continue  # its columns may have no type
                    self._columns(file, opened.schema_arrow, labels)
                    groups = opened.metadata.num_row_groups
                    counts += [opened.metadata.row_group(g).num_rows for g in range(groups)]
                    self.groups += [(number, g) for g in range(groups)]
            except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are subclasses of these
                raise UserError(f"{file}: {_reason(error)}") from error
        self.wanted = labels
        self.ends = np.cumsum(counts).tolist() if counts else []
        if not self.samples:
            raise UserError(f"{files[0]}: no rows" + (" …" if len(files) > 1 else ""))
        if self.text:
            self.classes = self._names()
            self.label = self.label if self.classes else ""
        self.labeled = bool(self.label)
        self._numbers = {name: number for number, name in enumerate(self.classes)}
        sizes = [f"{_base(file)}:{_size_bytes(file)}" for file in files]
        self.identity = "\0".join([self.image, self.label, *sizes]).encode("utf-8", "surrogateescape")

    @property
    def samples(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _columns(self, file: str, schema: ArrowSchema, labels: bool | None) -> None:
        """Choose the columns in the first file. Raise UserError if another file has different ones."""
        names = schema.names
        if not self.image:
            fitting = [name for name in names if _holds_bytes(schema.field(name).type)]
            self.image = next((name for name in IMAGE_COLUMNS if name in fitting), fitting[0] if fitting else "")
            if not self.image:
                raise UserError(f"{file}: no column of image bytes among {', '.join(names)}")
            if labels is not False:
                self.label, self.classes, self.text = self._labels(file, schema, labels)
                empty = [n for n in LABEL_COLUMNS if n in names and str(schema.field(n).type) == "null"]
                if empty and not self.label:
                    raise UserError(f"{file}: column {empty[0]}: holds nothing; --no-labels leaves it out")
        missing = [name for name in (self.image, self.label) if name and name not in names]
        if missing:
            raise UserError(f"{file}: has no column {', '.join(missing)}, which {self.files[0]} has")
        if not _holds_bytes(schema.field(self.image).type):
            raise UserError(f"{file}: column {self.image}: holds {schema.field(self.image).type}, not bytes of images")
        if self.label and self._labels(file, schema, labels) != (self.label, self.classes, self.text):
            raise UserError(f"{file}: column {self.label}: other labels or names of classes than {self.files[0]} has")

    def _labels(self, file: str, schema: ArrowSchema, labels: bool | None) -> tuple[str, list[str], bool]:
        """Find the column of labels.

        Returns:
            (column, class names if Hugging Face's ClassLabel lists them, whether the column itself holds names).
        """
        try:
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError):
            features = {}
        kinds = {name: str(schema.field(name).type) for name in LABEL_COLUMNS if name in schema.names}
        for name, kind in kinds.items():
            if kind.startswith(("int", "uint")):
                about = features.get(name) if isinstance(features, dict) else None
                classes = about.get("names") if isinstance(about, dict) else None
                return name, [str(c) for c in classes] if isinstance(classes, list) else [], False
        for name, kind in kinds.items():
            if re.match(r"(dictionary<values=)?(large_)?string", kind):
                return name, [], True
        if labels:
            raise UserError(f"{file}: no column of whole numbers or names called {', '.join(LABEL_COLUMNS)}")
        return "", [], False

    def _row_groups(self, first: int, columns: list[str]) -> Iterator[ArrowTable]:
        """Yield these columns of all row groups from `first` on. Raise UserError if one cannot be read."""
        for number, of_file in itertools.groupby(self.groups[first:], key=lambda place: place[0]):
            where = self.files[number]
            try:
                with _opened(import_parquet(), self.files[number]) as opened:
                    for _, group in of_file:
                        where = f"{self.files[number]}: row group {group}"
                        yield opened.read_row_group(group, columns=columns)
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: {_reason(error)}") from error

    def _names(self) -> list[str]:
        """Return the class names that occur in the files, sorted; names that are numbers are sorted by value.

        Return [] if the names seem to be captions, because few images share one, and no labels were requested.
        """
        distinct = set[str]()
        for part in self._row_groups(0, [self.label]):
            column = part.column(self.label)
            distinct.update(name for name in column.unique().to_pylist() if name)
        if not self.wanted and len(distinct) > max(self.samples * MOST_NAMED, FEW_NAMES):
            return []
        return sorted(distinct, key=int) if all(name.isdecimal() for name in distinct) else sorted(distinct)

    def read(self, first: int, end: int) -> Iterator[Sample]:
        columns = [name for name in (self.image, self.label) if name]
        at = bisect.bisect_right(self.ends, first)
        row_groups = self._row_groups(at, columns)
        while first < end:
            number, group = self.groups[at]
            begins = self.ends[at - 1] if at else 0
            part = next(row_groups).slice(first - begins, min(end, self.ends[at]) - first)
            images = part.column(self.image).to_pylist()
            labels = part.column(self.label).to_pylist() if self.label else [None] * len(images)
            for row, (image, label) in enumerate(zip(images, labels, strict=True), first - begins):
                data = image.get("bytes") if isinstance(image, dict) else image
                where = f"{_base(self.files[number])}: row group {group}, row {row}"
                yield where, data if data else "no bytes in it", self._checked(label, where)
            first, at = self.ends[at], at + 1

    def _checked(self, label: int | str | None, where: str) -> int | None:
        """Return the class number of a label. A negative number means no label, as in test sets.

        Raise UserError if the class does not exist, or if labels were requested and the image has none.
        """
        if isinstance(label, str):
            label = self._numbers.get(label)
        if label is None or label < 0:
            if self.wanted:
                raise UserError(f"{where}: has no label")
            return None
        if label >= (len(self.classes) or MOST_CLASSES):
            raise UserError(f"{where}: label {label} of {len(self.classes) or MOST_CLASSES} classes")
        return label


def _but(left_out: list[tuple[str, str]]) -> str:
    """Return the end of a message about a folder without images."""
    return f"; {LeftOut.of(left_out)}" if left_out else ""


def import_parquet() -> Any:
    """Import and return pyarrow.parquet.

    Raises:
        UserError: If pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"Parquet files need pyarrow: {how_to_get('parquet')}") from error
    return pyarrow.parquet


@contextmanager
def _opened(parquet: Any, file: str) -> Iterator[Any]:
    """Open a Parquet file, local or remote, as pyarrow's ParquetFile."""
    if not is_remote(file):
        with parquet.ParquetFile(file) as opened:
            yield opened
        return
    with open_in_parts(file) as stream, parquet.ParquetFile(stream) as opened:
        yield opened


def _size_bytes(file: str) -> int:
    if not is_remote(file):
        return os.path.getsize(file)
    with open_in_parts(file) as stream:
        return stream.seek(0, os.SEEK_END)


def _base(file: str) -> str:
    """Return the name of a file without its folder, and without the signature of a URL."""
    return os.path.basename(urllib.parse.urlsplit(file).path if is_remote(file) else file)


def _holds_bytes(kind: ArrowType) -> bool:
    """Check whether a column's type is bytes, or a struct with a field `bytes`."""
    if str(kind).startswith("struct"):
        return any(kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return str(kind) in ("binary", "large_binary", "binary_view")


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Shards:
    """Existing tar shards, in their order. They are packed again in shards of equal size. Class numbers stay."""

    def __init__(self, source: str, labels: bool | None, image_extension: str | None) -> None:
        self.reader = PackedReader(ShardImages(source, key="SOURCE", image_extension=image_extension))
        indexes = self.reader.images.indexes
        self.samples = sum(self.reader.images.counts)
        self.skipped = [
            (name, f"{reason}{f' ({count} in all)' if count > 1 else ''}")
            for reason, (count, name) in self.reader.images.left_out.found.items()
        ]
        self.identity = self.reader.fingerprint().encode()
        folder = source if os.path.isdir(source) else os.path.dirname(source)
        self.classes = [] if labels is False else class_names(folder) or []
        # one pass, because most indexes are read again at each access if there are many
        known = [] if labels is False else [(i.table[:, 3].min(initial=0), i.table[:, 4].any()) for i in indexes]
        self.labeled = labels is not False and all(least >= 0 for least, _ in known)
        if labels and not self.labeled:
            raise UserError(f"{source}: labels were asked for, but not every image has one")
        if self.labeled and any(in_json for _, in_json in known):
            raise UserError(
                f"{source}: its labels are in .json files, which are not packed; use the shards as they are, or leave "
                "the labels out with --no-labels"
            )

    def read(self, first: int, end: int) -> Iterator[Sample]:
        for i in range(first, end):
            label: int | str | None = None
            where = self.reader.name(i)
            if self.labeled:
                label = stored_label(self.reader.images, *self.reader.at(i))
            try:
                yield where, self.reader.read(i), label
            except BadImage as error:
                yield where, str(error), label
