"""One file that lists all shards of a folder, so that a run opens a shard's index only when it first reads the shard.

`mpp pack` and `mpp index` write `index.json` into the folder of the shards. The file is not trusted. If a shard's size
or date differ, its own index is read instead. An index that is opened later must have the digest in the listing.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from mpp.data.shards.index import BLOCK, ShardIndex, digest, left_out_from, write_whole
from mpp.data.walk import LeftOut

LISTING = "index.json"
FORMAT = 2
"""Version of listings. Version 1 did not record what was left out of each shard."""
MOST_LISTING_BYTES = 256 << 20
"""Greatest size of the listing of a remote folder: enough for some two million shards (a guess)."""
INDEXES_HELD = 512
"""Number of listed shards whose indexes are kept in memory: 20 MB if a shard has 1000 images. Indexes of shards without
a listing are always kept."""


class Entry(NamedTuple):
    """Facts about a shard that are known before its index is opened."""

    images: int
    size_bytes: int
    mtime_ns: int
    digest: str
    left_out: LeftOut


def entry_of(index: ShardIndex) -> Entry:
    return Entry(len(index.table), index.size_bytes, index.mtime_ns, digest(index), index.left_out)


def write_listing(folder: str | Path, indexes: Mapping[str, ShardIndex]) -> bool:
    """Write the listing of a folder, and return whether that succeeded. Entries of other existing shards are kept.

    Args:
        folder: Folder of the shards.
        indexes: Indexes of shards, by the shards' names in the folder.
    """
    path = Path(folder) / LISTING
    entries = {name: entry for name, entry in read_listing(path).items() if (path.parent / name).is_file()}
    entries |= {name: entry_of(index) for name, index in indexes.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {_as_json(entries[name])}" for name in sorted(entries))
    text = f'{{"format": {FORMAT}, "columns": {json.dumps(Entry._fields)}, "shards": {{\n{lines}\n}}}}\n'
    return write_whole(path, lambda f: f.write(text.encode()))


def _as_json(entry: Entry) -> str:
    return json.dumps([*entry[:-1], entry.left_out.found])


def read_listing(path: Path) -> dict[str, Entry]:
    """Read a listing, by the names of shards; {} if there is no valid one."""
    try:
        return parse_listing(path.read_bytes())
    except OSError:
        return {}


def parse_listing(data: bytes) -> dict[str, Entry]:
    """Parse the plausible entries of a listing. Return {} if the data is no listing, or has another format."""
    try:
        listing = json.loads(data)
        if listing["format"] != FORMAT:
            return {}
        return {name: entry for name, values in listing["shards"].items() if (entry := _plausible(values))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _plausible(values: object) -> Entry | None:
    if not isinstance(values, list) or [type(v) for v in values] != [int, int, int, str, dict]:
        return None
    left_out = left_out_from(values[-1])
    if left_out is None:
        return None
    images, size_bytes, mtime_ns, digest, _ = values
    entry = Entry(images, size_bytes, mtime_ns, digest, left_out)
    inside = 0 <= entry.images <= entry.size_bytes // BLOCK and entry.size_bytes < 1 << 63
    return entry if inside and re.fullmatch(r"[0-9a-f]{64}", entry.digest) else None


class Indexes(Sequence[ShardIndex]):
    """Indexes of shards, by number, which are opened when they are needed.

    Args:
        count: Number of shards.
        known: Indexes that are already open, by the number of the shard. They are kept.
        load: Function that opens the index of any other shard.
    """

    def __init__(self, count: int, known: Mapping[int, ShardIndex], load: Callable[[int], ShardIndex]) -> None:
        self._count, self._known, self._load = count, dict(known), load
        self._held: OrderedDict[int, ShardIndex] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, shard: int) -> ShardIndex: ...
    @overload
    def __getitem__(self, shard: slice) -> list[ShardIndex]: ...
    def __getitem__(self, shard: int | slice) -> ShardIndex | list[ShardIndex]:
        if isinstance(shard, slice):
            return [self[i] for i in range(*shard.indices(self._count))]
        if not -self._count <= shard < self._count:
            raise IndexError(shard)
        shard %= self._count
        if shard in self._known:
            return self._known[shard]
        index = self._held.get(shard)
        if index is None:
            index = self._held[shard] = self._load(shard)
            if len(self._held) > INDEXES_HELD:
                self._held.popitem(last=False)
        else:
            self._held.move_to_end(shard)
        return index
