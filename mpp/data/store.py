"""Shards as local files: a local path is itself, a remote one is copied once per machine into a bounded cache."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import BinaryIO

from mpp.data.index import scan
from mpp.errors import UserError, without_secrets

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""What may stand before ://. Nothing else is opened: no pipes, no fsspec chains, no file: tricks."""
TIMEOUT_S = 60
TRIES = 5
CHUNK_BYTES = 1 << 20


def default_cache_dir() -> str:
    return os.environ.get("MPP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "mpp")


def open_remote(url: str) -> tuple[BinaryIO, int | None]:
    """(stream, bytes it should give if the server says). UserError for a scheme not in SCHEMES."""
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in SCHEMES or "::" in url:
        raise UserError(f"{url}: scheme '{scheme}' is not read; allowed are local files and {', '.join(SCHEMES)}")
    if scheme in ("http", "https"):
        response = urllib.request.urlopen(url, timeout=TIMEOUT_S)
        length = response.headers.get("Content-Length")
        return response, int(length) if length else None
    try:
        import fsspec

        opened = fsspec.open(url, "rb").open()
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    return opened, getattr(opened, "size", None)


class Store:
    """A cache folder of remote shards, at most `limit_bytes` large, shared by every process of the machine."""

    def __init__(self, cache_dir: str | None = None, limit_bytes: float = 200e9) -> None:
        self.folder = Path(cache_dir or default_cache_dir()) / "shards"
        self.limit_bytes = limit_bytes
        self._in_use: set[Path] = set()

    def path(self, url: str) -> str:
        """The local file of a shard. UserError where it cannot be had after TRIES tries."""
        if "://" not in url:
            return url
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {self.folder}: {error.strerror}") from error
        try:
            base = os.path.basename(urllib.parse.urlsplit(url).path)
        except ValueError as error:
            raise UserError(f"{url}: {error}") from error
        digest = hashlib.sha256(without_secrets(url).encode()).hexdigest()[:16]
        name = f"{digest}-{base.removesuffix('.tar')[-100:]}.tar"
        target = self.folder / name
        with open(f"{target}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one copy per machine
            if not target.exists():
                self._copy(url, target)
            self._in_use.add(target)
            self._evict()
            os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))  # last use; the index keys on mtime
        return str(target)

    def _copy(self, url: str, target: Path) -> None:
        part = Path(f"{target}.part")
        for attempt in range(1, TRIES + 1):
            try:
                stream, expected = open_remote(url)
                with stream, open(part, "wb") as out:
                    copied = 0
                    while chunk := stream.read(CHUNK_BYTES):
                        out.write(chunk)
                        copied += len(chunk)
                if expected is not None and copied != expected:
                    raise OSError(f"{copied} of {expected} bytes arrived")
                try:
                    scan(str(part))
                except UserError as error:  # a login page with status 200, say: never let it into the cache
                    part.unlink()
                    raise UserError(
                        f"{url}: what arrived is no shard: {str(error).removeprefix(f'{part}: ')}"
                    ) from error
                os.replace(part, target)
                return
            except (OSError, ValueError, http.client.HTTPException) as error:
                # a 404 will not get better; everything else may
                if attempt == TRIES or getattr(error, "code", None) in (401, 403, 404, 410):
                    words = str(error) or type(error).__name__
                    raise UserError(f"{url}: {words} (tried {attempt} times)") from error
                time.sleep(0.1 * 2**attempt)

    def _evict(self) -> None:
        """Least recently used first; never a shard of this run. UserError where these alone are over the limit."""
        shards = [p for p in self.folder.iterdir() if p.suffix == ".tar" and p not in self._in_use]
        shards.sort(key=lambda p: p.stat().st_atime_ns)
        own = sum(p.stat().st_size for p in self._in_use)
        if own > self.limit_bytes:
            raise UserError(
                f"data.cache_limit_gb: {len(self._in_use)} shards of this run take {own / 1e9:.3f} GB already; "
                f"allowed are {self.limit_bytes / 1e9:.3f}"
            )
        total = own + sum(p.stat().st_size for p in shards)
        for path in shards:
            if total <= self.limit_bytes:
                break
            total -= path.stat().st_size
            path.unlink()  # open readers keep their file descriptor
