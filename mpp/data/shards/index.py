"""Where the images of a tar shard lie: a table of offsets and sizes, from its headers alone.

Any tar of images is a shard (WebDataset's naming: `key.jpg`, `key.cls`, `key.json`). The scan hops from header
to header; the first unusual one (long names, sparse files) hands the file to `tarfile`. A tar that was cut
off is found here, before the first step, by its missing end-of-archive blocks.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from braceexpand import braceexpand

from mpp.data.decoding.arrays import PARSING
from mpp.data.shards.remote import is_remote
from mpp.data.shards.samples import REASONS, samples_among
from mpp.data.walk import MOST_LETTERS, LeftOut, archives_in, images_among, is_hidden
from mpp.errors import UserError, suggest_path, without_secrets
from mpp.recipe.values import IMAGE

FORMAT = 3
"""1: before .npy files were images. 2: all images of a sample, and labels by names up to the first dot alone."""
BLOCK = 512
MOST_INDEX_BYTES = 256 << 20
"""Of the index of a shard that is not at hand: 6 million images (a guess)."""
TABLES = (".tsv", ".txt", ".xlsx", ".xls", ".ods", ".json", ".jsonl")
"""Endings of files that people may take for lists of images."""
MOST_PACKED = 1_000_000
"""Shards of a packing that are looked for by name."""
COLUMNS = ("image_offset", "image_size", "label_offset", "label_size", "label_is_json")
_PLAIN, _SKIPPED = b"0\0" + b"7", b"123456"


@dataclass(frozen=True)
class ShardIndex:
    """One shard's table: (images, 5) int64, see COLUMNS; label_size -1 where an image has none."""

    table: np.ndarray
    size_bytes: int
    mtime_ns: int
    files: tuple[str, ...] = ()
    """Where the images are files of their own: their paths below `folder`, a row of the table each."""
    folder: str = ""
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Members or files that could be taken for images or labels and are not."""


def _members_by_hopping(fd: int, size: int, path: str) -> tuple[list[tuple[str, int, int]], int] | None:
    """(name, offset, size) of regular members and where they end; None at a header that needs `tarfile`."""
    members, at = [], 0
    while at + BLOCK <= size:
        header = os.pread(fd, BLOCK, at)
        if header[0] == 0 and not any(header):
            break
        stated = header[148:156].strip(b" \0")
        total = sum(header) - sum(header[148:156]) + 8 * 32
        try:
            if int(stated, 8) != total:
                raise ValueError
            kind = header[156:157]
            if kind not in _PLAIN + _SKIPPED or header[124] & 0x80:
                return None
            digits = header[124:136].strip(b" \0")
            if not re.fullmatch(rb"[0-7]*", digits):  # int() would take a sign
                raise ValueError
            length = int(digits or b"0", 8)
        except ValueError:
            what = "not a tar file (a compressed one must be unpacked)" if at == 0 else f"corrupt header at byte {at}"
            raise UserError(f"{path}: {what}") from None
        if kind in _PLAIN:
            name = header[:100].split(b"\0")[0]
            if header[257:262] == b"ustar" and header[345]:
                name = header[345:500].split(b"\0")[0] + b"/" + name
            members.append((name.decode("utf-8", "surrogateescape"), at + BLOCK, length))
        else:
            length = 0
        at += BLOCK + -(-length // BLOCK) * BLOCK
    return members, at


def begins_member(header: bytes, size: int) -> bool:
    """Whether a tar's member of so many bytes begins with these."""
    try:
        member = tarfile.TarInfo.frombuf(header[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return member.isreg() and member.size == size


def _members_by_tarfile(path: str) -> tuple[list[tuple[str, int, int]], int]:
    members = []
    try:
        with tarfile.open(path, "r:") as tar:
            for m in tar:
                tar.members = []  # type: ignore[attr-defined]  # keep memory flat
                if m.size < 0:
                    raise tarfile.ReadError(f"{m.name}: negative size")
                if m.isreg() and not m.issparse():
                    members.append((m.name, m.offset_data, m.size))
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: cut off or corrupt: {error}") from error
    return members, end


def _regular_file(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a file; a shard is a tar file")
    return status


def scan(path: str, image_extension: str | None = None) -> ShardIndex:
    """Read a local shard's headers.

    Args:
        image_extension: See `samples_among`.

    Raises:
        UserError: The file is missing, cannot be read, is cut off or corrupt.
    """
    _regular_file(path)  # before it is opened: a pipe would wait for its other end
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        size = os.fstat(fd)
        if size.st_size == 0:
            raise UserError(f"{path}: empty file, not a tar")
        if size.st_size < BLOCK or path.lower().endswith(TABLES):
            raise UserError(f"{path}: not a tar file; a table of images is a CSV file whose name ends in .csv")
        members, end = _members_by_hopping(fd, size.st_size, path) or _members_by_tarfile(path)
        if os.pread(fd, 2 * BLOCK, end) != bytes(2 * BLOCK):
            before = sum(bool(IMAGE.search(name)) for name, _, _ in members)
            raise UserError(
                f"{path}: cut off: ends at byte {size.st_size} without tar's two end blocks, after {before} images"
            )
    finally:
        os.close(fd)
    rows, left_out = samples_among(members, image_extension)
    table = np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS))
    return ShardIndex(table, size.st_size, size.st_mtime_ns, left_out=left_out)


def index_path(shard: str, cache_dir: str | None = None, image_extension: str | None = None) -> Path:
    """Where a shard's index is: beside it, or in the cache folder. Each `image_extension` has an index of its own."""
    extension = f".{image_extension}" if image_extension else ""
    if cache_dir is None:
        return Path(f"{shard}{extension}.index.npz")
    name = hashlib.sha256(os.path.abspath(shard).encode()).hexdigest()[:32]
    return Path(cache_dir) / "indexes" / f"{name}{extension}.npz"


def read_index(file: Path | BinaryIO, size_bytes: int | None = None) -> ShardIndex | None:
    """A stored index of a shard, of so many bytes if known; None where it is none, or cannot be of that shard."""
    most_bytes = MOST_INDEX_BYTES if size_bytes is None else size_bytes * 8 * len(COLUMNS) // BLOCK + 30_000
    try:
        with zipfile.ZipFile(file) as packed:  # what it says of its size, before anything is unpacked
            if sum(part.file_size for part in packed.infolist()) > most_bytes:
                return None
        if not isinstance(file, Path):
            file.seek(0)
        with PARSING, np.load(file, allow_pickle=False) as z:
            if int(z["format"]) != FORMAT or z["table"].dtype != np.int64 or z["table"].shape[1:] != (len(COLUMNS),):
                return None
            left_out = left_out_from(json.loads(z["left_out"].tobytes()))
            if left_out is None:
                return None
            index = ShardIndex(z["table"], int(z["size_bytes"]), int(z["mtime_ns"]), left_out=left_out)
    except (OSError, ValueError, KeyError, EOFError, OverflowError, TypeError, zlib.error, zipfile.BadZipFile):
        return None
    except (NotImplementedError, RuntimeError):  # a zip of another kind, or encrypted
        return None
    return index if _plausible(index) else None


def _plausible(index: ShardIndex) -> bool:
    """Whether everything it names lies inside its shard: shards from elsewhere come with indexes from elsewhere."""
    table, size = index.table, index.size_bytes
    inside = (table[:, 0] >= BLOCK) & (table[:, 1] >= 0) & (table[:, 1] <= size) & (table[:, 0] <= size - table[:, 1])
    labeled = table[:, 3] >= 0
    labels = (table[:, 2] >= BLOCK) & (table[:, 3] <= size) & (table[:, 2] <= size - table[:, 3])
    return bool(inside.all() and (labels | ~labeled).all())


def write_index(path: Path, index: ShardIndex) -> bool:
    """Whether it could be written."""

    def write(f: BinaryIO) -> None:
        np.savez(
            f,
            format=np.int64(FORMAT),
            table=index.table,
            size_bytes=np.int64(index.size_bytes),
            mtime_ns=np.int64(index.mtime_ns),
            left_out=np.frombuffer(json.dumps(index.left_out.found).encode(), dtype=np.uint8),
        )

    return write_whole(path, write)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> bool:
    """Whether a file could be written; a reader sees all of it or none, however many write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as f:
            write(f)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        return False
    return True


def left_out_from(stored: object) -> LeftOut | None:
    """What a stored index or listing says of members; None if it cannot be what mpp wrote: it may be a server's."""
    if not isinstance(stored, dict):
        return None
    by_reason = {}
    for reason, about in stored.items():
        if reason not in REASONS or not isinstance(about, list) or [type(value) for value in about] != [int, str]:
            return None
        count, name = about
        if not 0 < count < 1 << 53 or len(name) > MOST_LETTERS:
            return None
        by_reason[reason] = (count, name)
    return LeftOut(by_reason)


def index_shard(shard: str, cache_dir: str, *, fresh: bool = False, image_extension: str | None = None) -> ShardIndex:
    """Read or make the index of a local shard. A new one is stored beside the shard, or in `cache_dir` if the shard's
    folder cannot be written.

    Args:
        fresh: Scan the shard even if a stored index fits it.
        image_extension: See `samples_among`.
    """
    status = _regular_file(shard)
    candidates = [index_path(shard, folder, image_extension) for folder in (None, cache_dir)]
    for path in [] if fresh else candidates:
        stored = read_index(path, status.st_size)
        if stored and (stored.size_bytes, stored.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return stored
    index = scan(shard, image_extension)
    any(write_index(path, index) for path in candidates)
    return index


def digest(index: ShardIndex) -> str:
    """Of a shard's table, and of its files where it has any."""
    sha256 = hashlib.sha256(np.ascontiguousarray(index.table).tobytes())
    sha256.update("\0".join(index.files).encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


def fingerprint(shards: Iterable[str], sizes_bytes: Iterable[int], digests: Iterable[str]) -> str:
    """Return what tells one run's data from another's: names, sizes and tables of all shards, not where they lie."""
    sha256 = hashlib.sha256()
    for shard, size_bytes, table in zip(shards, sizes_bytes, digests, strict=True):
        sha256.update(os.path.basename(without_secrets(shard)).encode() + f"\0{size_bytes}\0{table}\0".encode())
    return sha256.hexdigest()


def expand(spec: str | tuple[str, ...] | list[str], key: str, *, files: bool = False) -> list[str]:
    """Find the shards that a recipe names by a folder, file, glob, brace pattern, URL or a list of these.

    Args:
        spec: Of the recipe. What one item matches is sorted.
        key: Of the recipe, for messages.
        files: Whether a folder without shards stays as it is, because its images are files.

    Raises:
        UserError: Something matches nothing, or a shard comes twice.
    """
    expanded: list[str] = []
    for item in [spec] if isinstance(spec, str) else spec:
        if re.match(r"pipe:", item):
            raise UserError(f"{key}: '{item}': pipes are never run; give files or URLs")
        try:
            # a name with braces that is there is no pattern
            names = [item] if not is_remote(item) and os.path.exists(item) else list(braceexpand(item))
        except ValueError as error:
            raise UserError(f"{key}: '{item}': unbalanced braces") from error
        for name in names:
            if is_remote(name):
                matches = [name]
            elif os.path.isdir(name):
                _may_look(name, key)
                matches = [os.path.join(name, archive) for archive in archives_in(name)]
                if not matches and files:
                    matches = [name]
                elif matches:
                    _check_shards_of(name, key)
            elif glob.has_magic(name) and not os.path.exists(name):
                matches = sorted(glob.glob(name))
            else:
                matches = [name] if os.path.exists(name) else []
            if not matches and not is_remote(name) and not glob.has_magic(name):
                _may_look(name, key)
            if parquet := [match for match in matches if match.endswith(".parquet") and not is_remote(match)]:
                raise UserError(f"{key}: '{parquet[0]}': {packed_first(name if parquet == matches else parquet[0])}")
            if not matches:
                if name.endswith(".tar") or glob.has_magic(name) or os.path.isdir(name):
                    raise UserError(f"{key}: '{name}': no such shard; a folder must hold *.tar files")
                raise UserError(f"{key}: '{name}': no such file or folder{suggest_path(name)}")
            expanded += matches
    # the same file by another path is the same shard; a file that is a link may be meant as another one
    seen: dict[str, str] = {}
    for name in expanded:
        same = name
        if os.path.isdir(name):  # images as they are: a folder in another one is there twice
            same = os.path.realpath(name)
            for other in (o for o in seen if os.path.isdir(o)):
                if os.path.commonpath([same, other]) in (same, other) and same != other:
                    raise UserError(f"{key}: '{name}' and '{seen[other]}' overlap: one contains the other")
        elif not is_remote(name):
            same = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if same in seen:
            also = "" if seen[same] == name else f", also as '{seen[same]}'"
            raise UserError(f"{key}: '{name}' is named twice{also}")
        seen[same] = name
    return expanded


def packed_first(parquet: str) -> str:
    return f"Parquet is read by `mpp pack {shlex.quote(parquet)} OUT`, whose OUT can be given here"


def _check_shards_of(folder: str, key: str) -> None:
    """UserError where a folder holds more than shards, images beside them, or less than what was packed into it."""
    there = archives_in(folder)
    if images := images_among(n for n in os.listdir(folder) if not is_hidden(n)):
        raise UserError(holds_both(key, folder, there, sorted(images)))
    try:
        about = json.loads((Path(folder) / "dataset.json").read_text())
        unfinished = "images_listed" in about and "images" not in about
        packed = -(-int(about["images_listed"]) // int(about["images_per_shard"])) if "images_listed" in about else 0
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return
    if unfinished:
        raise UserError(
            f"{key}: '{folder}': was not packed to its end; the same `mpp pack` again, every part of it, finishes it"
        )
    lost = sorted({packed_name(k) for k in range(min(packed, MOST_PACKED))} - set(there))
    if lost and len(there) < packed:  # they may have got other names
        raise UserError(
            f"{key}: '{folder}': {len(lost)} of its {packed} shards are missing, such as {lost[0]}; copy them again, "
            f"or pack into a new folder. {os.path.join(folder, '*.tar')} means those that are there"
        )


def holds_both(key: str, folder: str, archives: list[str], images: list[str]) -> str:
    """What to say of a folder that holds tar files and images."""
    return (
        f"{key}: '{folder}': holds {len(archives)} shards, such as {archives[0]}, and {len(images)} images, such as "
        f"{images[0]}. Move the ones that are not meant elsewhere; '{os.path.join(folder, '*.tar')}' names the shards "
        "only"
    )


def packed_name(number: int) -> str:
    """Of the shards that `mpp pack` writes."""
    return f"shard-{number:06d}.tar"


def _may_look(name: str, key: str) -> None:
    """UserError where a place is not found because the way to it, or the place, may not be read."""
    try:
        os.stat(name)
        if os.path.isdir(name):
            os.listdir(name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{key}: '{name}': {error.strerror}") from error


def member_name(shard: str, image_offset: int) -> str:
    """The name of the member whose data begins at `image_offset`, for messages; '' if it cannot be told."""
    try:
        with open(shard, "rb") as f:
            f.seek(image_offset - BLOCK)
            return tarfile.TarInfo.frombuf(f.read(BLOCK), "utf-8", "surrogateescape").name
    except (OSError, tarfile.TarError):
        return ""


def class_names(folder: str) -> list[str] | None:
    """Read the class names that `mpp pack` left beside the shards of a folder; None if there are none.

    Raises:
        UserError: The file cannot be read: numbers would take the place of the names.
    """
    path = Path(folder) / "dataset.json"
    try:
        names = json.loads(path.read_bytes().decode("utf-8-sig")).get("classes")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        fault = getattr(error, "strerror", None) or "not an object of JSON in UTF-8"
        raise UserError(f"{path}: {fault}; it names the classes of the shards beside it") from error
    if not names:
        return None
    if not isinstance(names, list) or len({str(name) for name in names}) < len(names) or None in names:
        raise UserError(f"{path}: classes: must be a list of different names")
    return [str(name) for name in names]
