"""One file about all shards of a folder, so that a run opens the index of a shard when it first reads from it.

`mpp pack` and `mpp index` write `index.json` into the folder of the shards. It is not trusted: for a shard of another
size or date, the shard's own index is read, and an index that is opened later must be the one that it names.
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
"""1: without what was left out of each shard."""
MOST_LISTING_BYTES = 256 << 20
"""Of the listing of a folder that is not at hand: some two million shards (a guess)."""
INDEXES_HELD = 512
"""Indexes of shards that are kept open, beside those that no listing speaks of: 20 MB where a shard has 1000 images."""


class Entry(NamedTuple):
    """What is known of a shard before it is opened."""

    images: int
    size_bytes: int
    mtime_ns: int
    digest: str
    left_out: LeftOut


def entry_of(index: ShardIndex) -> Entry:
    return Entry(len(index.table), index.size_bytes, index.mtime_ns, digest(index), index.left_out)


def write_listing(folder: str | Path, indexes: Mapping[str, ShardIndex]) -> bool:
    """Whether it could be written. indexes: of shards by their names in the folder; what is listed of others stays."""
    path = Path(folder) / LISTING
    entries = {name: entry for name, entry in read_listing(path).items() if (path.parent / name).is_file()}
    entries |= {name: entry_of(index) for name, index in indexes.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {_as_json(entries[name])}" for name in sorted(entries))
    text = f'{{"format": {FORMAT}, "columns": {json.dumps(Entry._fields)}, "shards": {{\n{lines}\n}}}}\n'
    return write_whole(path, lambda f: f.write(text.encode()))


def _as_json(entry: Entry) -> str:
    return json.dumps([*entry[:-1], entry.left_out.found])


def read_listing(path: Path) -> dict[str, Entry]:
    """By the names of shards; {} where there is none that can be read."""
    try:
        return parse_listing(path.read_bytes())
    except OSError:
        return {}


def parse_listing(data: bytes) -> dict[str, Entry]:
    """Entries that can be of a shard; {} where this is no listing, or one of another format."""
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
    """Of shards, by number. known: those that are there already; `load` opens any other when it is asked for."""

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
