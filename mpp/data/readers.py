"""Read the bytes, names and sizes of images by number, from files or from shards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mpp.data.files import read_regular
from mpp.data.shards.reader import ShardImages, evenly, holds_shards, images_of
from mpp.data.walk import LeftOut
from mpp.errors import BadImage, MppWarning, UserError

LOOKED_INTO = 16
"""Number of files whose bytes are part of a fingerprint."""


class Reader(Protocol):
    """Bytes, names and sizes in bytes of images, by number."""

    def read(self, i: int) -> bytes: ...
    def name(self, i: int) -> str: ...
    def sizes(self) -> np.ndarray: ...
    def fingerprint(self) -> str: ...


class LabeledImages(Protocol):
    """Labeled images by number, with labels of any kind."""

    @property
    def reader(self) -> Reader: ...
    @property
    def classes(self) -> list[str]: ...
    @property
    def left_out(self) -> LeftOut:
        """Files and members that are not among the images."""
        ...

    @property
    def strata(self) -> np.ndarray:
        """Stratum of each image for a held-out split, (images,) int64: its class if it has exactly one, else 0."""
        ...

    def class_of_each(self) -> np.ndarray | None:
        """Return the class of each image, (images,) int64; None if an image may have several, or none."""
        ...

    def __len__(self) -> int: ...
    def fingerprint(self) -> str:
        """Return a text that identifies the images and their labels. Their location does not change it."""
        ...

    def subset(self, *, labels_per_class: int | None, fraction: float | None, seed: int) -> np.ndarray:
        """Return the numbers of the images to train on, ascending: all, a number of each class, or a fraction."""
        ...


class FileReader:
    """Reader of separate image files."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def read(self, i: int) -> bytes:
        return read_regular(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i]

    def sizes(self) -> np.ndarray:
        return np.asarray([file_size(path) for path in self.paths], dtype=np.int64)

    def fingerprint(self) -> str:
        """Return the names and sizes of all files and a hash of the bytes of a few, because arrays have equal sizes."""
        digest = hashlib.sha256()
        for i in evenly(len(self.paths), LOOKED_INTO):
            with contextlib.suppress(OSError, BadImage):
                digest.update(self.read(i))
        return "\0".join([*(f"{os.path.basename(p)}:{file_size(p)}" for p in self.paths), digest.hexdigest()])


def file_size(path: str) -> int:
    """Return the size of a file in bytes; -1 if it is missing."""
    try:
        return os.path.getsize(path)
    except OSError:  # for example a broken link: an unreadable image
        return -1


class PackedReader:
    """Reader of images in shards.

    Args:
        images: Indexed shards.
        few: Whether only a few images of each shard will be read, so that remote shards need not be fetched.
    """

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


class AllImages:
    """Reader of all images of some places, those in shards first.

    Args:
        places: Shards (see `holds_shards`), image files, or folders of images at any depth.
        key: Recipe key or command option, for messages.
        few: Whether only a few images will be read, so that remote shards need not be fetched.

    Raises:
        UserError: If there are no images.
    """

    def __init__(self, places: Sequence[str], key: str, *, few: bool = False) -> None:
        of_shards, of_files = (tuple(p for p in places if holds_shards(p) == wanted) for wanted in (True, False))
        self.packed = PackedReader(ShardImages(of_shards, key=key), few=few) if of_shards else None
        if self.packed and self.packed.images.left_out:
            warnings.warn(f"{key}: {self.packed.images.left_out}", MppWarning, stacklevel=3)
        self.files = FileReader(images_of(of_files))
        self.first_file = sum(self.packed.images.counts) if self.packed else 0
        if not len(self):
            raise UserError(f"{key}: no images given")

    def __len__(self) -> int:
        return self.first_file + len(self.files.paths)

    def _at(self, i: int) -> tuple[Reader, int]:
        return (self.packed, i) if self.packed and i < self.first_file else (self.files, i - self.first_file)

    def read(self, i: int) -> bytes:
        reader, number = self._at(i)
        return reader.read(number)

    def name(self, i: int) -> str:
        reader, number = self._at(i)
        return reader.name(number)

    def sizes(self) -> np.ndarray:
        return np.concatenate([*([self.packed.sizes()] if self.packed else []), self.files.sizes()])

    def fingerprint(self) -> str:
        return "\0".join([*([self.packed.fingerprint()] if self.packed else []), self.files.fingerprint()])
