"""Read remote files: http and https through urllib; s3, gs and hf through fsspec. Other schemes are refused."""

from __future__ import annotations

import base64
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPMessage
from typing import IO, BinaryIO

from mpp.errors import UserError, how_to_get, one_line
from mpp.recipe.flat import JsonObject

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""Accepted URL schemes. Pipes, fsspec chains and file: URLs are refused."""
EXTRAS = ("s3", "gs")
"""Schemes whose libraries are installed by an extra with the same name."""
READ_AHEAD_BYTES = 16 << 20
TIMEOUT_S = 60
"""Seconds without any byte before a request fails (a guess)."""
FOR_A_WHILE = (408, 425, 429)
"""Status codes 4xx that are temporary."""
FAULTS = (OSError, ValueError, EOFError, http.client.HTTPException)
"""Exceptions that a server, a network or a client library may cause."""


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
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        system.invalidate_cache()
        facts: JsonObject = system.info(path)
        etag = str(facts.get("ETag") or facts.get("etag") or facts.get("generation") or "") or None
        block_bytes = READ_AHEAD_BYTES if stop is None else stop - start
        stream = system.open(path, "rb", block_size=block_bytes, cache_type="readahead")
    except FAULTS:
        raise
    except ImportError as error:
        scheme = url.partition("://")[0]
        advice = f"; {how_to_get(scheme)}" if scheme in EXTRAS else ""
        raise UserError(f"{url}: {error}{advice}") from error
    except Exception as error:  # each library has its own exceptions
        raise UserError(f"{url}: {type(error).__name__}: {one_line(error)}") from error
    with stream:
        begins = start if version in (None, etag) else 0
        stream.seek(begins)
        yield Answer(stream, begins, facts.get("size"), etag)


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


def is_final(error: BaseException) -> bool:
    """Check whether another try cannot help."""
    if isinstance(error, urllib.error.HTTPError):
        return 300 <= error.code < 500 and error.code not in FOR_A_WHILE
    return isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError, http.client.InvalidURL))


def wished_pause_s(error: BaseException) -> float:
    """Return the pause in seconds that the server requests; 0 if it requests none."""
    wished = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    return float(wished) if wished and wished.isdecimal() else 0.0
