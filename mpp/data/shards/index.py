"""Index tar shards: a table of the offsets and sizes of their images, made from the tar headers only.

Any tar of images is a shard (WebDataset's naming: `key.jpg`, `key.cls`, `key.json`). The scan hops from header
to header. At the first unusual header (long names, sparse files) `tarfile` takes over. A truncated tar is detected
here, before the first step, because its end-of-archive blocks are missing.
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
"""Version of stored indexes. Version 1 did not list .npy files as images. Version 2 listed all images of a sample, and
matched labels only by the name up to the first dot."""
BLOCK = 512
MOST_INDEX_BYTES = 256 << 20
"""Greatest size of an index if the size of its shard is unknown: enough for 6 million images (a guess)."""
TABLES = (".tsv", ".txt", ".xlsx", ".xls", ".ods", ".json", ".jsonl")
"""File name endings of tables, which users may pass as lists of images."""
MOST_PACKED = 1_000_000
"""Greatest number of packed shards that are looked for by name."""
COLUMNS = ("image_offset", "image_size", "label_offset", "label_size", "label_is_json")
_PLAIN, _SKIPPED = b"0\0" + b"7", b"123456"


@dataclass(frozen=True)
class ShardIndex:
    """Index of one shard."""

    table: np.ndarray
    """(images, 5) int64, see COLUMNS. label_size is -1 if an image has no label."""
    size_bytes: int
    mtime_ns: int
    files: tuple[str, ...] = ()
    """Paths below `folder`, one for each row of the table, if the images are separate files."""
    folder: str = ""
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Members or files that look like images or labels and are not used."""


def _members_by_hopping(fd: int, size: int, path: str) -> tuple[list[tuple[str, int, int]], int] | None:
    """Return (name, offset, size) of each regular member, and the offset of their end.

    Return None if a header requires `tarfile`.
    """
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
            if not re.fullmatch(rb"[0-7]*", digits):  # int() would accept a sign
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
    """Check whether `header` is the tar header of a regular member with `size` bytes."""
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
    """Index a local shard from its headers.

    Args:
        image_extension: See `samples_among`.

    Raises:
        UserError: If the file is missing, unreadable, truncated or corrupt.
    """
    _regular_file(path)  # checked first, because opening a pipe would block until its other end is opened
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
    """Return the path of a shard's index: next to the shard, or in the cache folder if one is given.

    Each `image_extension` has a separate index.
    """
    extension = f".{image_extension}" if image_extension else ""
    if cache_dir is None:
        return Path(f"{shard}{extension}.index.npz")
    name = hashlib.sha256(os.path.abspath(shard).encode()).hexdigest()[:32]
    return Path(cache_dir) / "indexes" / f"{name}{extension}.npz"


def read_index(file: Path | BinaryIO, size_bytes: int | None = None) -> ShardIndex | None:
    """Read a stored index.

    Args:
        file: Path of the index, or its open file.
        size_bytes: Size of the shard. None means unknown.

    Returns:
        The index. None if the file is not an index of the current format, or is impossible for the shard.
    """
    most_bytes = MOST_INDEX_BYTES if size_bytes is None else size_bytes * 8 * len(COLUMNS) // BLOCK + 30_000
    try:
        with zipfile.ZipFile(file) as packed:  # check the stated sizes before anything is unpacked
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
    """Check that all offsets are inside the shard. An index from a server is as untrusted as its shard."""
    table, size = index.table, index.size_bytes
    inside = (table[:, 0] >= BLOCK) & (table[:, 1] >= 0) & (table[:, 1] <= size) & (table[:, 0] <= size - table[:, 1])
    labeled = table[:, 3] >= 0
    labels = (table[:, 2] >= BLOCK) & (table[:, 3] <= size) & (table[:, 2] <= size - table[:, 3])
    return bool(inside.all() and (labels | ~labeled).all())


def write_index(path: Path, index: ShardIndex) -> bool:
    """Write an index, and return whether that succeeded."""

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
    """Write a file, and return whether that succeeded.

    Readers see the whole file or none of it, even if several processes write it at the same time.
    """
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
    """Parse the record of left-out members in a stored index or listing.

    Return None if mpp cannot have written the record: the file may come from a server.
    """
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
    """Read or make the index of a local shard.

    A new index is stored next to the shard, or in `cache_dir` if the shard's folder cannot be written.

    Args:
        fresh: Whether to scan the shard even if a stored index matches it.
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
    """Return the SHA-256 of an index's table and of its list of files."""
    sha256 = hashlib.sha256(np.ascontiguousarray(index.table).tobytes())
    sha256.update("\0".join(index.files).encode("utf-8", "surrogateescape"))
    return sha256.hexdigest()


def fingerprint(shards: Iterable[str], sizes_bytes: Iterable[int], digests: Iterable[str]) -> str:
    """Return a hash of the names, sizes and table digests of all shards. Their folders do not change it."""
    sha256 = hashlib.sha256()
    for shard, size_bytes, table in zip(shards, sizes_bytes, digests, strict=True):
        sha256.update(os.path.basename(without_secrets(shard)).encode() + f"\0{size_bytes}\0{table}\0".encode())
    return sha256.hexdigest()


def expand(spec: str | tuple[str, ...] | list[str], key: str, *, files: bool = False) -> list[str]:
    """Find the shards that a recipe names by a folder, file, glob, brace pattern, URL or a list of these.

    Args:
        spec: Value in the recipe. The matches of one item are sorted.
        key: Recipe key, for messages.
        files: Whether a folder without shards is returned unchanged, because its images are separate files.

    Raises:
        UserError: If an item matches nothing, or a shard is named twice.
    """
    expanded: list[str] = []
    for item in [spec] if isinstance(spec, str) else spec:
        if re.match(r"pipe:", item):
            raise UserError(f"{key}: '{item}': pipes are never run; give files or URLs")
        try:
            # the name of an existing file or folder is not a pattern, even if it contains braces
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
            if parquet := [match for match in matches if match.endswith(".parquet")]:
                raise UserError(f"{key}: '{parquet[0]}': {packed_first(name if parquet == matches else parquet[0])}")
            if not matches:
                if name.endswith(".tar") or glob.has_magic(name) or os.path.isdir(name):
                    raise UserError(f"{key}: '{name}': no such shard; a folder must hold *.tar files")
                raise UserError(f"{key}: '{name}': no such file or folder{suggest_path(name)}")
            expanded += matches
    # Detect the same shard under another path. Only its folder is resolved: a link to a file counts as another shard.
    seen: dict[str, str] = {}
    for name in expanded:
        same = name
        if os.path.isdir(name):  # of images: a folder inside another one would be read twice
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
    """Raise UserError if a folder holds images as well as shards, or lacks shards that were packed into it."""
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
            f"{key}: '{folder}': packing is incomplete; run `mpp pack` again with the same arguments (all parts)"
        )
    lost = sorted({packed_name(k) for k in range(min(packed, MOST_PACKED))} - set(there))
    if lost and len(there) < packed:  # otherwise they may have been renamed
        raise UserError(
            f"{key}: '{folder}': {len(lost)} of its {packed} shards are missing, such as {lost[0]}; copy them again, "
            f"or pack into a new folder. {os.path.join(folder, '*.tar')} means those that are there"
        )


def holds_both(key: str, folder: str, archives: list[str], images: list[str]) -> str:
    """Return the message about a folder that holds both tar files and images."""
    return (
        f"{key}: '{folder}': holds {len(archives)} shards, such as {archives[0]}, and {len(images)} images, such as "
        f"{images[0]}. Move the ones that are not meant elsewhere; '{os.path.join(folder, '*.tar')}' names the shards "
        "only"
    )


def packed_name(number: int) -> str:
    """Return the file name of a shard that `mpp pack` writes."""
    return f"shard-{number:06d}.tar"


def _may_look(name: str, key: str) -> None:
    """Raise UserError if a place cannot be accessed. A place that does not exist is accepted here."""
    try:
        os.stat(name)
        if os.path.isdir(name):
            os.listdir(name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{key}: '{name}': {error.strerror}") from error


def member_name(shard: str, image_offset: int) -> str:
    """Return the name of the member whose data begins at `image_offset`, for messages; '' if it is unknown."""
    try:
        with open(shard, "rb") as f:
            f.seek(image_offset - BLOCK)
            return tarfile.TarInfo.frombuf(f.read(BLOCK), "utf-8", "surrogateescape").name
    except (OSError, tarfile.TarError):
        return ""


def class_names(folder: str) -> list[str] | None:
    """Read the class names that `mpp pack` wrote next to the shards of a folder; None if there are none.

    Raises:
        UserError: If the file cannot be read, because numbers would replace the names.
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
