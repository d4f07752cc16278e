"""Images of indexed shards by (shard, row), through pread: safe across forks, no page faults on a cut file.

Images that are files of their own are read as they are, as if they lay in shards.
"""

from __future__ import annotations

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

INDEXES_AT_A_TIME = 8  # small files of a server far away, most likely
OPEN_FILES = 128  # file descriptors kept per process; far below the usual limit of 1024
REPLACEMENTS = 64  # good neighbours looked for, before a grey image stands in
MOST_LABEL_BYTES = 1 << 20

T = TypeVar("T")
"""What an image is decoded to."""


class ShardImages:
    """Indexed shards. UserError where they cannot be read or hold no image.

    Remote ones are fetched when they are read: `require` says at once whether the cache can hold what that takes.
    `left_out` says what was not taken for an image.
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
        """image_extension: which member of a sample is its image, see `samples_among`."""
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
        """{} where there is none. It is of the indexes without `image_extension` alone."""
        if self.store.image_extension:
            return {}
        return self.store.listing(folder) if is_remote(folder) else read_listing(Path(folder) / LISTING)

    def _indexed(
        self, name: str, key: str, listings: dict[str, dict[str, Entry]]
    ) -> list[tuple[str, ShardIndex | Entry]]:
        """What is known of a shard without opening its index, where a listing says so; else its index."""
        if is_place(name):
            return [*shards_of(name, key)]
        folder = _folder(name)
        listed = listings[folder].get(os.path.basename(name)) if folder is not None else None
        if listed and not is_remote(name):
            with suppress(OSError):  # the index says what is wrong
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
        """Bytes of each of these shards that is remote."""
        return {i: self._entries[i].size_bytes for i in shards if is_remote(self.names[i])}

    def require(self, shards: Iterable[int], what: str, advice: str = "") -> None:
        """Check that the cache holds these shards at a time.

        Args:
            shards: Their numbers.
            what: Needs them, for the message.
            advice: What would do beside a larger cache.

        Raises:
            UserError: The cache is too small.
        """
        needed = sum(self.remote(shards).values())
        if needed > self.store.limit_bytes:
            raise UserError(
                f"data.cache_limit_gb: {what} {needed / 1e9:.6g} GB of remote shards at a time; "
                f"the limit is {self.store.limit_bytes / 1e9:.6g}{advice}"
            )

    @property
    def fingerprint(self) -> str:
        """It stays the same if the data move to another place."""
        return fingerprint(
            self._lasting_names, (e.size_bytes for e in self._entries), (e.digest for e in self._entries)
        )

    def _descriptor(self, shard: int) -> int:
        if self._pid != os.getpid():  # a forked worker keeps its own list
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
            shard: Its number.
            row: Of the image in the shard.
            few: Whether only a few images of the shard will be read, so that a remote one is not fetched.

        Raises:
            BadImage: They are too many to be an image.
        """
        index = self.indexes[shard]
        offset, size = index.table[row, :2].tolist()
        check_bytes(size)
        if index.files:
            return read_file(os.path.join(index.folder, index.files[row]), size)
        return self._bytes(shard, offset, size, few)

    def read_label(self, shard: int, row: int) -> tuple[bytes, bool] | None:
        """The bytes of an image's label and whether they are JSON; None where it has none."""
        offset, size, is_json = self.indexes[shard].table[row, 2:].tolist()
        if size > MOST_LABEL_BYTES:
            raise UserError(f"{self.name(shard, row)}: a label of {size} bytes; expected at most {MOST_LABEL_BYTES}")
        return (self._bytes(shard, offset, size), bool(is_json)) if size >= 0 else None

    def name(self, shard: int, row: int) -> str:
        """`shard: member`, or a file, for messages."""
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
        """Read and decode an image; in place of a bad one, the next good one of its shard.

        After REPLACEMENTS bad ones in a row it returns `blank`, so that every process always gets full batches.

        Args:
            shard: Its number.
            row: Of the image in the shard.
            rows: Those that may replace it.
            decode: Makes a value of the bytes.
            blank: The value that replaces an image.
            few: As of `read`.

        Returns:
            What `decode` made, and a line for each bad image that was passed over.
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
    """Images that lie below folders of shards, where only the shards are read."""
    left_out = LeftOut()
    for place in [spec] if isinstance(spec, str) else spec:
        if os.path.isdir(place) and archives_in(place):
            images, _ = list_images(place)
            left_out.add_all(LeftOut.of((name, "image in a folder below shards") for name in images), f"{place}/")
    return left_out


def _folder(shard: str) -> str | None:
    """Of a shard; None where an URL's end is a signature that holds for the shard alone."""
    if is_remote(shard):
        return None if "?" in shard else shard.rpartition("/")[0]
    return os.path.dirname(shard)


def held_out_rows(counts: list[int], held_out: int) -> np.ndarray:
    """Return how many rows at the end of each shard are held out, spread over the shards: (shards,) int64.

    Raises:
        UserError: Fewer than twice as many images are there.
    """
    total = sum(counts)
    if total < 2 * held_out:
        raise UserError(f"data.held_out is {held_out}, but there are only {total} images; use at most {total // 2}")
    share = np.asarray(counts) * held_out // total
    order = np.argsort(-(np.asarray(counts) * held_out % total), kind="stable")
    share[order[: held_out - int(share.sum())]] += 1
    return share


def images_of(places: Sequence[str]) -> list[str]:
    """Files as they are, folders as the images in them, sorted. Warns of what folders hold that is not taken.

    Raises:
        UserError: A place or its images are missing.
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
            names.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    return names


def holds_shards(place: str) -> bool:
    """Whether a place is one of shards: a tar file, a pattern, an URL, or a folder with tar files in it."""
    if os.path.isdir(place):
        return bool(archives_in(place))
    if os.path.isfile(place):
        return place.endswith(".tar")
    return place.endswith(".tar") or is_remote(place) or any(c in place for c in "*?{[")


def evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` numbers, spread evenly, the first and the last among them; ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
