"""Separate image files: a folder of images, or a CSV file that lists them."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from mpp.data.shards.index import COLUMNS, ShardIndex, packed_first
from mpp.data.walk import LeftOut, list_images
from mpp.errors import BadImage, UserError
from mpp.rng import Purpose, stream

FILES_PER_SHARD = 1000
"""Number of files that are treated as one shard, the default of `mpp pack`."""
MOST_IMAGE_BYTES = 1 << 30
"""Greatest size of an image file, which is read at once. Uncompressed, 64 megapixels of 16-bit RGBA are half of it."""
STATS_AT_A_TIME = 32
"""Threads that ask for the sizes of files, which may be on a server."""


def read_manifest(path: str, columns: Sequence[str], optional: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV file of images.

    Column names are compared in lower case. Spaces around names and values are removed.

    Args:
        columns: Names of the required columns. `image` must have a value in every row.
        optional: Names of the columns that are read if they exist.

    Returns:
        (line, value of each column) of every row that is not blank.

    Raises:
        UserError: If the file cannot be read or is invalid, with the line of the fault.
    """
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            return _rows(path, text, columns, optional)
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8; in a spreadsheet, save it as 'CSV UTF-8'") from error


def _rows(path: str, text: TextIO, columns: Sequence[str], optional: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Parse the rows of a CSV file, see `read_manifest`."""
    reader = csv.reader(text, skipinitialspace=True, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        wanted = [*columns, *(name for name in optional if name in header)]
        if not set(columns) <= set(header):
            separated = next((mark for mark in (";", "\t") if mark in ",".join(header)), None)
            raise UserError(
                f"{path}:1: needs the column{'s' if len(columns) > 1 else ''} {' and '.join(columns)}; "
                f"got {', '.join(header) or 'nothing'}"
                + (f". Columns are separated by commas, not by {separated!r}" if separated else "")
            )
        if twice := [name for name in wanted if header.count(name) > 1]:
            raise UserError(f"{path}:1: two columns are called {twice[0]}")
        rows, last = [], reader.line_num
        places = {name: header.index(name) for name in wanted}
        for row in reader:
            line, last = last + 1, reader.line_num
            if not any(value.strip() for value in row):
                continue
            if len(row) != len(header):
                raise UserError(f"{path}:{line}: {len(row)} columns, where the first line has {len(header)}")
            values = {name: row[place].strip() for name, place in places.items()}
            for name, value in values.items():
                if odd := _ODD.search(value):
                    what = {"\0": "a zero byte", "\t": "a tab"}.get(odd[0], "a line break; is a quote left open?")
                    raise UserError(f"{path}:{line}: {name}: {what}")
            if not values.get("image", "."):
                raise UserError(f"{path}:{line}: no image")
            rows.append((line, values))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; is a quote left open?") from error
    if not rows:
        raise UserError(f"{path}: no images in it")
    return rows


_ODD = re.compile(r"[\0\n\r\t]")
"""Characters that are not accepted in paths and labels."""


def is_place(name: str) -> bool:
    """Check whether a name from `expand` means separate image files: a folder without shards, or a CSV file."""
    return os.path.isdir(name) or name.lower().endswith(".csv")


def places(name: str, key: str) -> tuple[str, list[str], LeftOut]:
    """Find separate image files: the images of a folder, or those that a CSV file lists.

    Returns:
        (folder, paths below the folder, files that were left out).

    Raises:
        UserError: If there are no images.
    """
    if os.path.isdir(name):
        files, left_out = list_images(name)
        if not files:
            if any(Path(name).rglob("*.parquet")):
                raise UserError(f"{key}: '{name}': {packed_first(name)}")
            raise UserError(f"{key}: '{name}': no such shard, and no image; a folder must hold *.tar files or images")
        return name, files, LeftOut.of(left_out)
    return os.path.dirname(name), [values["image"] for _, values in read_manifest(name, ["image"])], LeftOut()


def shards_of(name: str, key: str) -> list[tuple[str, ShardIndex]]:
    """Group separate image files into shards, shuffled as `mpp pack` shuffles them.

    Returns:
        (name, index) of each shard.

    Raises:
        UserError: If there are no images, or the folder or CSV file cannot be read.
    """
    folder, paths, left_out = places(name, key)
    order = stream(0, Purpose.PACK).permutation(len(paths))
    with ThreadPoolExecutor(STATS_AT_A_TIME) as threads:
        parts = [paths[i : i + FILES_PER_SHARD] for i in range(0, len(paths), FILES_PER_SHARD)]
        sizes = [
            size
            for part_sizes in threads.map(lambda part: [_size(os.path.join(folder, p)) for p in part], parts)
            for size in part_sizes
        ]
    shards = []
    for start in range(0, len(paths), FILES_PER_SHARD):
        part = order[start : start + FILES_PER_SHARD].tolist()
        table = np.full((len(part), len(COLUMNS)), -1, dtype=np.int64)
        table[:, 0], table[:, 1] = 0, [sizes[i] for i in part]
        index = ShardIndex(table, int(table[:, 1].sum()), 0, tuple(paths[i] for i in part), folder, left_out)
        left_out = LeftOut()  # named once, with the first part
        shards.append((f"{name}, part {start // FILES_PER_SHARD}", index))
    return shards


def _size(path: str) -> int:
    """Return the size of a file in bytes; 0 if it cannot be read, so that reading it later raises BadImage."""
    try:
        status = os.stat(path)
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    except OSError:
        return 0


def read_file(path: str, size: int) -> bytes:
    """Read the bytes of a file.

    Raises:
        BadImage: If the file cannot be read, or its size has changed since the run began.
    """
    data = read_regular(path)
    if len(data) != size:
        raise BadImage(f"changed since the run began: {len(data)} bytes, it had {size}")
    return data


def check_bytes(size: int) -> None:
    """Check that a file may be read into memory.

    Raises:
        BadImage: If it is larger than MOST_IMAGE_BYTES.
    """
    if size > MOST_IMAGE_BYTES:
        raise BadImage(f"a file of {size} bytes; expected at most {MOST_IMAGE_BYTES}")


def open_regular(path: str) -> BinaryIO:
    """Open a regular file. Opening a pipe would block.

    Raises:
        BadImage: If it is not a regular file.
        OSError: If it cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadImage("not a file")
    return open(path, "rb")


def read_regular(path: str) -> bytes:
    """Read a regular file. Reading a pipe would block, and a device has no end.

    Raises:
        BadImage: If the file is not regular, too large, or cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a file")
        check_bytes(status.st_size)
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
