"""Cache of remote shards: each is copied when it is needed, once for all processes of a machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import os
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpp.data.shards import remote
from mpp.data.shards.index import (
    BLOCK,
    MOST_INDEX_BYTES,
    ShardIndex,
    begins_member,
    index_path,
    index_shard,
    read_index,
    scan,
    write_index,
)
from mpp.data.shards.listing import LISTING, MOST_LISTING_BYTES, Entry, parse_listing
from mpp.data.shards.remote import PAUSE_S, TRIES
from mpp.errors import MppWarning, UserError, without_secrets

MOST_PAUSE_S = 60.0
"""Greatest pause between tries in seconds."""
CHUNK_BYTES = 1 << 20
WHOLE_ABOVE = 0.25
"""If more than this share of a shard has been read in parts, the whole shard is fetched (a guess)."""


def default_cache_dir() -> str:
    return os.environ.get("MPP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "mpp")


class Store:
    """A cache folder of remote shards, at most `limit_bytes` large, shared by every process of the machine.

    The least recently used shard is deleted first, and fetched again when it is needed. A cached shard is never
    compared with its server again: it stays as it was when it was fetched.
    """

    def __init__(
        self, cache_dir: str | None = None, limit_bytes: float = 200e9, image_extension: str | None = None
    ) -> None:
        """Prepare the cache; folders are made when they are needed.

        Args:
            cache_dir: Folder of the cache. None means `default_cache_dir`.
            limit_bytes: Greatest size of all cached shards.
            image_extension: Extension of the member that is a sample's image, see `samples_among`.
        """
        self.image_extension = image_extension
        self.cache_dir = cache_dir or default_cache_dir()
        self.folder = Path(self.cache_dir) / "shards"
        self.limit_bytes = limit_bytes
        self._known: dict[str, tuple[int, int, int]] = {}
        """For each URL, inode, size and mtime of the copy that this process last found to match its index."""
        self._in_parts: dict[str, int] = {}

    def target(self, url: str) -> Path:
        """Return the path of a shard's copy. The copy need not exist."""
        return self.folder / _name_of(url)

    def fetch(self, url: str, *, wait: bool = True) -> Path | None:
        """Return the local copy of a shard, fetch it if necessary, and mark it as used now.

        Args:
            url: URL of the shard.
            wait: Whether to wait if another process is fetching the shard. If false, None is returned then.

        Raises:
            UserError: If TRIES tries in a row fail.
        """
        target = self.target(url)
        with self._locked(target.with_name(target.name + ".lock"), wait=wait) as locked:
            if not locked:
                return None
            if not target.exists():
                self._copy(url, target)
            _use(target)
        return target

    def index(self, url: str) -> ShardIndex:
        """Return the index of a shard: stored, next to the shard (see `mpp index`), or made from the fetched shard."""
        target = self.target(url)
        stored = self._stored_index(target)
        index = read_index(stored)
        if index is None:
            index = self._index_elsewhere(url)
            if index is not None:
                write_index(stored, index)
        for _ in range(TRIES):
            if index is not None:
                return index
            self.fetch(url)
            index = read_index(stored) or self._index_of(target)
        raise UserError(
            f"{url}: its copy in {self.folder} keeps disappearing; is another program deleting files there?"
        )

    def read(self, url: str, index: ShardIndex, offset: int, size: int, *, few: bool = False) -> bytes:
        """Read bytes of a shard.

        Args:
            url: URL of the shard.
            index: Index of the shard.
            offset: Position of the first byte.
            size: Number of bytes.
            few: Whether only a small part of the shard will be read, so that the shard need not be fetched.

        Raises:
            UserError: If the shard does not match its index, or cannot be fetched.
        """
        if few and not self.target(url).exists():
            self._in_parts[url] = self._in_parts.get(url, 0) + size
            if self._in_parts[url] <= WHOLE_ABOVE * index.size_bytes:
                with contextlib.suppress(*remote.FAULTS):  # the fetch below reports what is wrong
                    part = remote.read_part(url, offset - BLOCK, BLOCK + size, index.size_bytes)
                    if part is not None and begins_member(part, size):
                        return part[BLOCK:]
        fd = self._open(url, index)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)  # a deleted file uses disk space until it is closed

    def _open(self, url: str, index: ShardIndex) -> int:
        target = self.target(url)
        while True:
            try:
                fd = os.open(target, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                self.fetch(url)
                continue
            except OSError as error:
                raise UserError(f"{target}: {error.strerror}") from error
            status = os.fstat(fd)
            file = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._known.get(url) == file:
                if time.time_ns() - status.st_atime_ns > 1_000_000_000:
                    _use(target)
                return fd
            os.close(fd)
            now = self._index_of(target)
            if now is None:
                continue
            if now.size_bytes != index.size_bytes or not np.array_equal(now.table, index.table):
                raise UserError(f"{url}: changed since it was indexed; start again")
            self._known[url] = file

    def _index_of(self, target: Path) -> ShardIndex | None:
        """Return the index of a cached copy; None if the copy has left the cache."""
        try:
            return self.index_local(str(target))
        except UserError:
            if target.exists():
                raise
            return None

    def index_local(self, shard: str, *, fresh: bool = False) -> ShardIndex:
        """Return the index of a local shard, see `index_shard`."""
        return index_shard(shard, self.cache_dir, fresh=fresh, image_extension=self.image_extension)

    def _stored_index(self, target: Path) -> Path:
        return index_path(str(target), image_extension=self.image_extension)

    def listing(self, folder: str) -> dict[str, Entry]:
        """Return the listing of the shards below an URL; {} if there is none."""
        try:
            with remote.opened(f"{folder}/{LISTING}") as answer:
                return parse_listing(answer.stream.read(MOST_LISTING_BYTES))
        except remote.FAULTS:
            return {}

    def _index_elsewhere(self, url: str) -> ShardIndex | None:
        """Return the index next to a remote shard; None if there is no valid one."""
        try:
            beside = remote.next_to(url, str(index_path("", image_extension=self.image_extension)))
            with remote.opened(beside) as answer:
                return read_index(io.BytesIO(answer.stream.read(MOST_INDEX_BYTES)))
        except remote.FAULTS:  # servers report a missing file in many ways
            return None

    def _copy(self, url: str, target: Path) -> None:
        part = target.with_name(target.name + ".part")
        try:
            index = self._download(url, part)
        except UserError:
            part.unlink(missing_ok=True)
            raise
        with self._room():  # a process that counts files sees it under one of its two names
            os.replace(part, target)
        write_index(self._stored_index(target), index)

    def _download(self, url: str, part: Path) -> ShardIndex:
        have, furthest, tries, version = 0, 0, 0, None
        while True:
            try:
                with (
                    remote.opened(url, start=have, version=version) as answer,
                    open(part, "r+b" if have else "wb") as out,
                ):
                    have, version, total = answer.start, answer.version, answer.total
                    if total is not None:
                        self._make_room(url, part, total)
                    out.seek(have)
                    while chunk := answer.stream.read(CHUNK_BYTES):
                        if total is None:
                            self._make_room(url, part, have + len(chunk))
                        out.write(chunk)
                        have += len(chunk)
                if total is not None and have != total:
                    raise OSError(f"{have} of {total} bytes arrived")
                break
            except remote.FAULTS as error:
                tries, furthest = (1, have) if have > furthest else (tries + 1, furthest)
                if version is None or isinstance(error, remote.Changed):
                    have = 0
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    advice = "lower data.cache_limit_gb, or give another data.cache_dir"
                    raise UserError(f"{url}: no space left in {self.folder}: {advice}") from error
                words = str(error) or type(error).__name__
                if tries == TRIES or remote.is_final(error):
                    raise UserError(f"{url}: {words} (tried {tries} times)") from error
                if tries == 2:  # a single failure is common
                    warnings.warn(f"{url}: {words}; asking again", MppWarning, stacklevel=2)
                time.sleep(min(max(PAUSE_S * 2**tries, remote.wished_pause_s(error)), MOST_PAUSE_S))
        os.truncate(part, have)
        try:
            return scan(str(part), self.image_extension)
        except UserError as error:  # for example a login page with status 200, which must not enter the cache
            raise UserError(f"{url}: the download is not a shard: {str(error).removeprefix(f'{part}: ')}") from error

    def _make_room(self, url: str, part: Path, size: int) -> None:
        """Set `part` to its full size once there is room for it. The least recently used shards are deleted for it.

        Raise UserError if the shard does not fit into an empty cache.
        """
        while True:
            with self._room():
                sizes, oldest = self._files(but=part)
                total = sum(sizes.values())
                for path in oldest:
                    if total + size <= self.limit_bytes:
                        break
                    path.unlink(missing_ok=True)
                    total -= sizes[path]
                if total + size <= self.limit_bytes:
                    os.truncate(part, size)
                    return
            if total == 0:
                raise UserError(
                    f"data.cache_limit_gb: {url} takes {size / 1e9:.6g} GB; the limit is {self.limit_bytes / 1e9:.6g}"
                )
            time.sleep(0.05)  # other shards are being fetched, and can be deleted afterwards

    def _files(self, *, but: Path) -> tuple[dict[Path, int], list[Path]]:
        """Return the bytes of each file in the cache, and the files that may be deleted, least recently used first."""
        sizes, used = {}, {}
        for path in self.folder.iterdir():
            if path == but or not path.name.endswith((".tar", ".tar.part")):
                continue
            if path.suffix == ".part":
                with self._locked(path.with_suffix(".lock"), wait=False) as abandoned:
                    if abandoned:  # the process that wrote it died
                        path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                sizes[path] = status.st_size
                if path.suffix == ".tar":
                    used[path] = status.st_atime_ns
        return sizes, sorted(used, key=lambda path: used[path])

    def _room(self) -> contextlib.AbstractContextManager[bool]:
        """Return the lock under which files of the cache are added, deleted and counted."""
        return self._locked(self.folder / "room.lock")

    @contextlib.contextmanager
    def _locked(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock that one thread of one process can hold at a time.

        Yield False if another one holds it and `wait` is false.
        """
        with contextlib.ExitStack() as until_the_end:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = until_the_end.enter_context(open(path, "w"))
            except OSError as error:
                raise UserError(f"data.cache_dir: {path.parent}: {error.strerror}") from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


@functools.cache
def _name_of(url: str) -> str:
    """Return the file name of a shard's copy. It does not depend on a signature in the URL.

    The name is remembered because it is needed for each image.
    """
    try:
        base = os.path.basename(urllib.parse.urlsplit(url).path)
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error
    digest = hashlib.sha256(without_secrets(url).encode()).hexdigest()[:16]
    return f"{digest}-{base.removesuffix('.tar')[-100:]}.tar"


def _use(path: Path) -> None:
    """Mark a copy as used now. Its mtime stays the same, because its index records it."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
