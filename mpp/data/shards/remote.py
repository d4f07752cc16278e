"""Read remote files: http and https through urllib; s3, gs and hf through fsspec. Other schemes are refused."""

from __future__ import annotations

import base64
import glob
import http.client
import io
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import IO, Any, BinaryIO, TypeVar

from mpp.errors import UserError, how_to_get, one_line
from mpp.recipe.flat import JsonObject

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""Accepted URL schemes. Pipes, fsspec chains and file: URLs are refused."""
EXTRAS = ("s3", "gs")
"""Schemes whose libraries are installed by an extra with the same name."""
READ_AHEAD_BYTES = 16 << 20
PART_BYTES = 4 << 20
"""Least number of bytes of a request for a part of a file."""
TIMEOUT_S = 60
"""Seconds without any byte before a request fails (a guess)."""
TRIES = 8
"""Number of tries in a row without a new byte after which a request or download fails."""
PAUSE_S = 0.1
"""Pause between tries in seconds, doubled with each try: 8 tries take half a minute (a guess)."""
FOR_A_WHILE = (408, 425, 429)
"""Status codes 4xx that are temporary."""
FAULTS = (OSError, ValueError, EOFError, http.client.HTTPException)
"""Exceptions that a server, a network or a client library may cause."""


R = TypeVar("R")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Handler of redirects, which are followed only to http and https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise UserError(f"{req.full_url}: is redirected to {newurl}; only http and https redirects are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_Redirects)


@dataclass(frozen=True)
class Answer:
    """A server's answer to a request for a file."""

    stream: BinaryIO
    start: int
    """Position in the file at which the stream begins, in bytes."""
    total: int | None
    """Bytes of the whole file; None if the server does not state it."""
    version: str | None
    """Identifier of this version of the file, such as its ETag; None if the server gives none."""


class Changed(OSError):
    """Raised if a file has changed since an earlier answer."""


def is_remote(place: str) -> bool:
    return "://" in place


def next_to(url: str, ending: str) -> str:
    """Return the URL of the file whose name is that of `url` with this ending added."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(path=parts.path + ending).geturl()


@contextmanager
def opened(url: str, *, start: int = 0, stop: int | None = None, version: str | None = None) -> Iterator[Answer]:
    """Open a remote file at a position.

    If the server does not support that or the file has changed, the whole file is opened.

    Args:
        url: URL with a scheme of SCHEMES.
        start: Position of the first byte.
        stop: Position after the last byte. None means the end of the file.
        version: Version in an earlier answer, to detect that the file has changed since then.

    Raises:
        UserError: If the scheme is unknown.
        Changed: If the server sends another part, or a part of a changed file.
        Exception: One of FAULTS, if the file cannot be opened.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in SCHEMES or "::" in url:
        raise UserError(f"{url}: scheme '{scheme}' cannot be read; use local files, {', '.join(SCHEMES)}")
    if scheme not in ("http", "https"):
        with _through_fsspec(url, start, stop, version) as answer:
            yield answer
        return
    request = urllib.request.Request(url)
    parts = urllib.parse.urlsplit(url)
    if parts.username is not None:
        request = urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    if start or stop is not None:
        request.add_header("Range", f"bytes={start}-{'' if stop is None else stop - 1}")
        if version is not None:
            request.add_header("If-Range", version)
    with _opener.open(request, timeout=TIMEOUT_S) as response:
        etag = response.headers.get("ETag") or ""
        if not etag or etag.startswith("W/"):  # a weak ETag does not guarantee equal bytes
            etag = response.headers.get("Last-Modified") or ""
        begins, total = 0, response.headers.get("Content-Length")
        if response.status == 206:
            content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
            if not content_range or int(content_range[1]) != start or (version is not None and etag != version):
                raise Changed("the server sent another part, or a part of another file")
            begins, total = start, None if content_range[2] == "*" else content_range[2]
        yield Answer(response, begins, int(total) if total else None, etag or None)


@contextmanager
def _through_fsspec(url: str, start: int, stop: int | None, version: str | None) -> Iterator[Answer]:
    system, path = _file_system(url)
    try:
        system.invalidate_cache()
        facts: JsonObject = system.info(path)
        etag = str(facts.get("ETag") or facts.get("etag") or facts.get("generation") or "") or None
        block_bytes = READ_AHEAD_BYTES if stop is None else stop - start
        stream = system.open(path, "rb", block_size=block_bytes, cache_type="readahead")
    except FAULTS:
        raise
    except Exception as error:  # each library has its own exceptions
        raise UserError(f"{url}: {type(error).__name__}: {one_line(error)}") from error
    with stream:
        begins = start if version in (None, etag) else 0
        stream.seek(begins)
        yield Answer(stream, begins, facts.get("size"), etag)


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        return system, path
    except FAULTS:
        raise
    except ImportError as error:
        scheme = url.partition("://")[0]
        advice = f"; {how_to_get(scheme)}" if scheme in EXTRAS else ""
        raise UserError(f"{url}: {error}{advice}") from error
    except Exception as error:  # each library has its own exceptions
        raise UserError(f"{url}: {type(error).__name__}: {one_line(error)}") from error


def read_part(url: str, start: int, size: int, total: int) -> bytes | None:
    """Read `size` bytes from `start` of a remote file.

    Returns:
        The bytes. None if the file does not have `total` bytes, or the server sends another or a shorter part.
    """
    with opened(url, start=start, stop=start + size) as answer:
        if answer.total != total or answer.start != start:
            return None
        part = answer.stream.read(size)
    return part if len(part) == size else None


def open_in_parts(url: str) -> BinaryIO:
    """Open a remote file to read parts of it, in any order.

    Args:
        url: URL with a scheme of SCHEMES.

    Raises:
        UserError: If the file cannot be opened.
    """
    if urllib.parse.urlsplit(url).scheme in ("http", "https"):
        return io.BufferedReader(_OnWebServer(url), PART_BYTES)
    system, path = _file_system(url)
    try:
        opened_file: BinaryIO = system.open(path, "rb", block_size=PART_BYTES, cache_type="readahead")
        return opened_file
    except Exception as error:  # each library has its own exceptions
        raise UserError(f"{url}: {type(error).__name__}: {one_line(error)}") from error


class _OnWebServer(io.RawIOBase):
    """A file on a web server, with a request for each read.

    Raises:
        UserError: If the file cannot be opened, or its server sends no parts of files.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._at, self._version = url, 0, None
        self._size, self._version = self._tried(0, 1, _size_and_version)

    def _tried(self, start: int, stop: int, use: Callable[[Answer], R]) -> R:
        """Call a function with the answer to a request for a part. Errors that may pass are tried again."""
        for tries in range(1, TRIES + 1):
            try:
                with opened(self._url, start=start, stop=stop, version=self._version) as answer:
                    return use(answer)
            except FAULTS as error:
                if tries == TRIES or is_final(error):
                    raise UserError(f"{self._url}: {one_line(error)} (tried {tries} times)") from error
                time.sleep(max(PAUSE_S * 2**tries, wished_pause_s(error)))
        raise AssertionError("unreachable")

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)

        def read(answer: Answer) -> bytes:
            if answer.start != self._at:
                raise ValueError("the server sends whole files only; download them first")
            data = answer.stream.read(stop - self._at)
            if len(data) < stop - self._at:
                raise OSError("the server sent less than it was asked for")
            return data

        data = self._tried(self._at, stop, read) if stop > self._at else b""
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _size_and_version(answer: Answer) -> tuple[int, str | None]:
    if answer.total is None:
        raise ValueError("the server does not tell the size of the file")
    return answer.total, answer.version


def list_files(place: str, ending: str) -> list[str]:
    """List the files below a remote folder, or those that match a pattern, by their URLs, sorted.

    Args:
        place: URL of a folder or pattern in a bucket or on the Hugging Face Hub.
        ending: Ending that the files in a folder must have.

    Raises:
        UserError: If they cannot be listed.
    """
    scheme = urllib.parse.urlsplit(place).scheme
    if scheme in ("http", "https") or scheme not in SCHEMES:
        raise UserError(
            f"{place}: files are listed in {', '.join(f'{s}://' for s in SCHEMES[2:])}; name each file here"
        )
    system, path = _file_system(place)
    try:
        found = system.glob(path if glob.has_magic(path) else f"{path.rstrip('/')}/**/*{ending}")
        return sorted(system.unstrip_protocol(name) for name in found)
    except Exception as error:  # each library has its own exceptions
        raise UserError(f"{place}: {type(error).__name__}: {one_line(error)}") from error


def is_final(error: BaseException) -> bool:
    """Check whether another try cannot help."""
    if isinstance(error, urllib.error.HTTPError):
        return 300 <= error.code < 500 and error.code not in FOR_A_WHILE
    return isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError, http.client.InvalidURL))


def wished_pause_s(error: BaseException) -> float:
    """Return the pause in seconds that the server requests; 0 if it requests none."""
    wished = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    return float(wished) if wished and wished.isdecimal() else 0.0
