"""Read images of indexed shards by (shard, row).

pread is safe across forks, and a truncated file causes no page fault. Separate image files are read as if they were in
shards.
"""

from __future__ import annotations

import glob
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from mpp.data.files import check_bytes, is_place, read_file, shards_of
from mpp.data.shards.index import ShardIndex, expand, fingerprint, member_name
from mpp.data.shards.listing import LISTING, Entry, Indexes, entry_of, read_listing
from mpp.data.shards.remote import is_remote
from mpp.data.shards.store import Store
from mpp.data.walk import LeftOut, archives_in, images_below, list_images
from mpp.errors import BadImage, MppWarning, UserError, without_secrets
from mpp.recipe.values import IMAGE

INDEXES_AT_A_TIME = 8  # most likely small files on a distant server
OPEN_FILES = 128  # file descriptors kept per process; far below the usual limit of 1024
REPLACEMENTS = 64  # neighbours that are tried before a grey image replaces a bad one
MOST_LABEL_BYTES = 1 << 20

T = TypeVar("T")
"""Type of a decoded image."""


class ShardImages:
    """Indexed shards. UserError is raised if they cannot be read or hold no image.

    Remote shards are fetched when they are read. `require` checks beforehand whether the cache is large enough.
    `left_out` records the members and files that are not among the images.
    """

    def __init__(
        self,
        spec: str | tuple[str, ...],
        *,
        key: str,
        cache_dir: str | None = None,
        cache_limit_bytes: float = 200e9,
        image_extension: str | None = None,
    ) -> None:
        """Find the shards and index them.

        Args:
            spec: Shards or folders of images, as a recipe names them; see `expand`.
            key: Recipe key, for messages.
            cache_dir: Cache folder of remote shards. None means the default.
            cache_limit_bytes: Greatest size of all cached shards.
            image_extension: Extension of the member that is a sample's image, see `samples_among`.
        """
        named = expand(spec, key, files=True)
        if image_extension and (folder := next(filter(is_place, named), None)):
            raise UserError(f"data.image_extension: for tar shards; '{folder}' holds files of images")
        self.store = Store(cache_dir, cache_limit_bytes, image_extension)
        folders = {_folder(name) for name in named if not is_place(name)}
        listings = {folder: self._listing(folder) for folder in folders if folder is not None}
        with ThreadPoolExecutor(INDEXES_AT_A_TIME) as threads:
            parts_of_each = threads.map(partial(self._indexed, key=key, listings=listings), named)
            named_indexes = [part for parts in parts_of_each for part in parts]
        self.names = [name for name, _ in named_indexes]
        known = {i: index for i, (_, index) in enumerate(named_indexes) if isinstance(index, ShardIndex)}
        self._entries = [entry_of(index) if isinstance(index, ShardIndex) else index for _, index in named_indexes]
        self.indexes = Indexes(len(named_indexes), known, self._open_index)
        self.counts = [entry.images for entry in self._entries]
        self.left_out = _below_shards(spec)
        self._lasting_names: list[str] = []
        for (name, index), entry in zip(named_indexes, self._entries, strict=True):
            if isinstance(index, ShardIndex) and index.files:
                self.left_out.add_all(entry.left_out, f"{index.folder}/")
                self._lasting_names.append(name.rpartition(", ")[2])
            else:
                self.left_out.add_all(entry.left_out, f"{without_secrets(name)}: ")
                self._lasting_names.append(name)
        if sum(self.counts) == 0:
            where = self.names[0] + (" …" if len(self.names) > 1 else "")
            reason = f"; {self.left_out}" if self.left_out else ""
            if image_extension:
                reason = f"; data.image_extension is {image_extension}, as in x.{image_extension}"
            raise UserError(f"{key}: no images in {where}{reason}")
        self._open: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def _listing(self, folder: str) -> dict[str, Entry]:
        """Return the listing of a folder; {} if there is none. Listings do not cover `image_extension`."""
        if self.store.image_extension:
            return {}
        return self.store.listing(folder) if is_remote(folder) else read_listing(Path(folder) / LISTING)

    def _indexed(
        self, name: str, key: str, listings: dict[str, dict[str, Entry]]
    ) -> list[tuple[str, ShardIndex | Entry]]:
        """Return (name, entry of the listing) of a shard, or (name, index) if no listing describes it.

        A place of separate images becomes several shards.
        """
        if is_place(name):
            return [*shards_of(name, key)]
        folder = _folder(name)
        listed = listings[folder].get(os.path.basename(name)) if folder is not None else None
        if listed and not is_remote(name):
            with suppress(OSError):  # reading the index reports what is wrong
                status = os.stat(name)
                if (status.st_size, status.st_mtime_ns) != (listed.size_bytes, listed.mtime_ns):
                    listed = None
        return [(name, listed or self._own_index(name))]

    def _own_index(self, name: str) -> ShardIndex:
        return self.store.index(name) if is_remote(name) else self.store.index_local(name)

    def _open_index(self, shard: int) -> ShardIndex:
        name = self.names[shard]
        index = self._own_index(name)
        opened, listed = entry_of(index), self._entries[shard]
        if (opened.size_bytes, opened.digest) != (listed.size_bytes, listed.digest):
            raise UserError(
                f"{name}: does not match {LISTING} in the same folder; rebuild the index with `mpp index FOLDER`"
            )
        return index

    def remote(self, shards: Iterable[int]) -> dict[int, int]:
        """Return the sizes in bytes of the remote shards among `shards`, by number."""
        return {i: self._entries[i].size_bytes for i in shards if is_remote(self.names[i])}

    def require(self, shards: Iterable[int], what: str, advice: str = "") -> None:
        """Check that the cache can hold all these shards at the same time.

        Args:
            shards: Numbers of the shards.
            what: Text of the message about the purpose of the shards, with its verb.
            advice: Text of the message about remedies other than a larger cache.

        Raises:
            UserError: If the cache is too small.
        """
        needed = sum(self.remote(shards).values())
        if needed > self.store.limit_bytes:
            raise UserError(
                f"data.cache_limit_gb: {what} {needed / 1e9:.6g} GB of remote shards at a time; "
                f"the limit is {self.store.limit_bytes / 1e9:.6g}{advice}"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the shards. It stays the same if the data is moved."""
        return fingerprint(
            self._lasting_names, (e.size_bytes for e in self._entries), (e.digest for e in self._entries)
        )

    def _descriptor(self, shard: int) -> int:
        if self._pid != os.getpid():  # a forked worker opens files of its own
            self._open, self._pid = OrderedDict(), os.getpid()
        fd = self._open.get(shard)
        if fd is None:
            path, index = self.names[shard], self.indexes[shard]
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error
            stat = os.fstat(fd)
            if (stat.st_size, stat.st_mtime_ns) != (index.size_bytes, index.mtime_ns):
                os.close(fd)
                raise UserError(f"{path}: changed since it was indexed; start again (`mpp index` checks it)")
            self._open[shard] = fd
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return fd

    def _bytes(self, shard: int, offset: int, size: int, few: bool = False) -> bytes:
        if is_remote(self.names[shard]):
            return self.store.read(self.names[shard], self.indexes[shard], offset, size, few=few)
        return os.pread(self._descriptor(shard), size, offset)

    def read(self, shard: int, row: int, *, few: bool = False) -> bytes:
        """Read the bytes of an image.

        Args:
            shard: Number of the shard.
            row: Row of the image in the shard.
            few: Whether only a few images of the shard will be read, so that a remote shard need not be fetched.

        Raises:
            BadImage: If the image is too large, or a separate file cannot be read or has changed.
        """
        index = self.indexes[shard]
        offset, size = index.table[row, :2].tolist()
        check_bytes(size)
        if index.files:
            return read_file(os.path.join(index.folder, index.files[row]), size)
        return self._bytes(shard, offset, size, few)

    def read_label(self, shard: int, row: int) -> tuple[bytes, bool] | None:
        """Return the bytes of an image's label and whether they are JSON; None if the image has no label."""
        offset, size, is_json = self.indexes[shard].table[row, 2:].tolist()
        if size > MOST_LABEL_BYTES:
            raise UserError(f"{self.name(shard, row)}: a label of {size} bytes; expected at most {MOST_LABEL_BYTES}")
        return (self._bytes(shard, offset, size), bool(is_json)) if size >= 0 else None

    def name(self, shard: int, row: int) -> str:
        """Return `shard: member`, or the path of a separate file, for messages."""
        name, index = self.names[shard], self.indexes[shard]
        if index.files:
            return os.path.join(index.folder, index.files[row])
        path = str(self.store.target(name)) if is_remote(name) else name
        return f"{name}: {member_name(path, int(self.indexes[shard].table[row, 0]))}"

    def load(
        self,
        shard: int,
        row: int,
        rows: range,
        decode: Callable[[bytes], T],
        *,
        blank: T,
        few: bool = False,
    ) -> tuple[T, list[str]]:
        """Read and decode an image. A bad image is replaced by the next good one of its shard.

        After REPLACEMENTS bad images in a row, return `blank`, so that every process always gets full batches.

        Args:
            shard: Number of the shard.
            row: Row of the image in the shard.
            rows: Rows that may replace the image, `row` among them.
            decode: Function that decodes the bytes.
            blank: Value that replaces the image if no good one is found.
            few: Whether only a few images of the shard will be read, see `read`.

        Returns:
            The decoded image, and a line for each bad image that was skipped.
        """
        bad: list[str] = []
        for step in range(min(REPLACEMENTS, len(rows))):
            at = rows[(row - rows.start + step) % len(rows)]
            try:
                return decode(self.read(shard, at, few=few)), bad
            except BadImage as error:
                bad.append(f"{self.name(shard, at)}: {error}")
        return blank, bad


def _below_shards(spec: str | tuple[str, ...]) -> LeftOut:
    """List the images in subfolders of folders of shards, because only the shards are read."""
    left_out = LeftOut()
    for place in [spec] if isinstance(spec, str) else spec:
        if os.path.isdir(place) and archives_in(place):
            images, _ = list_images(place)
            left_out.add_all(LeftOut.of((name, "image in a folder below shards") for name in images), f"{place}/")
    return left_out


def _folder(shard: str) -> str | None:
    """Return the folder of a shard; None if its URL ends with a signature that is valid only for this shard."""
    if is_remote(shard):
        return None if "?" in shard else shard.rpartition("/")[0]
    return os.path.dirname(shard)


def held_out_rows(counts: list[int], held_out: int) -> np.ndarray:
    """Return the number of rows at the end of each shard that are held out: (shards,) int64.

    Each shard's number is in proportion to its images.

    Args:
        counts: Images of each shard.
        held_out: Number of images to hold out.

    Raises:
        UserError: If there are fewer than twice as many images.
    """
    total = sum(counts)
    if total < 2 * held_out:
        raise UserError(f"data.held_out is {held_out}, but there are only {total} images; use at most {total // 2}")
    share = np.asarray(counts) * held_out // total
    order = np.argsort(-(np.asarray(counts) * held_out % total), kind="stable")
    share[order[: held_out - int(share.sum())]] += 1
    return share


LISTS = (".csv", ".tsv", ".parquet")
"""Endings of files that list images."""


def images_of(places: Sequence[str]) -> list[str]:
    """List image files: given files unchanged, and those of folders and patterns, sorted. Warn of files left out.

    Raises:
        UserError: If a place does not exist or has no images.
    """
    names: list[str] = []
    for place in places:
        if os.path.isdir(place):
            inside, left_out = images_below(place)
            if not inside:
                shards = "; shards are not read here" if archives_in(place) else ""
                raise UserError(f"{place}: no images in it{shards}" + (f"; {left_out}" if left_out else ""))
            if left_out:
                warnings.warn(f"{place}: {left_out}", MppWarning, stacklevel=2)
            names += inside
        elif os.path.exists(place):
            if place.lower().endswith(LISTS):
                raise UserError(f"{place}: a list is not an image; give images or folders")
            names.append(place)
        elif matching := sorted(glob.glob(place, recursive=True)):
            names += matching
        else:
            raise UserError(f"{place}: no such {'image' if glob.has_magic(place) else 'file or folder'}")
    return names


def holds_shards(place: str) -> bool:
    """Check whether a place consists of shards: a tar file, a pattern, a URL, or a folder with tar files in it."""
    if os.path.isdir(place):
        return bool(archives_in(place))
    if os.path.isfile(place):
        return place.endswith(".tar")
    if IMAGE.search(place) and not is_remote(place):
        return False
    return place.endswith(".tar") or is_remote(place) or any(c in place for c in "*?{[")


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0 … count - 1, evenly spread from the first to the last, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
