"""Serve a folder over HTTP on this machine. The server can be slow, break off, refuse or change its mind."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Served:
    """What a server did, and how it answers the next requests for shards."""

    folder: Path
    ranges: bool = True
    """Whether a request for a part of a file is answered with that part."""
    tags: bool = True
    """Whether answers have an ETag, which identifies the version of the file."""
    weak: bool = False
    """Whether the ETags are weak: they identify what a file means, not its bytes."""
    lengths: bool = True
    indexes: bool = True
    """Whether the indexes next to the shards are served."""
    listings: bool = False
    """Whether index.json, which covers all shards, is served."""
    bytes_per_s: float = 0.0
    faults: deque[dict[str, Any]] = field(default_factory=deque)
    """Faults of the next requests for shards, one each, as dictionaries of these keys:

    status, retry_after_s, location: status code and headers of an answer without content
    shift: bytes by which a part begins later than requested
    cut: number of bytes that are sent
    length: Content-Length of the answer
    then: function that is called before the content is sent
    """
    log: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(path, status, first byte, bytes sent) of each request."""
    url: str = ""
    login: str | None = None
    """Authorization header that requests must have."""

    def whole(self, name: str = ".tar") -> int:
        """Return how often files whose path ends so were sent from their first byte to their last."""
        sizes = {f"/{p.name}": p.stat().st_size for p in self.folder.iterdir()}
        return sum(path.endswith(name) and sent == sizes[path] for path, _, _, sent in self.log)


class Handler(BaseHTTPRequestHandler):
    served: Served

    def do_GET(self) -> None:
        served, path = self.served, self.path.split("?")[0]
        fault = served.faults.popleft() if served.faults and path.endswith(".tar") else {}
        file = served.folder / path.lstrip("/")
        if served.login and self.headers.get("Authorization") != served.login:
            fault = {"status": 401}
        kept_back = (not served.indexes and path.endswith(".npz")) or (
            not served.listings and path.endswith("/index.json")
        )
        if fault.get("status") or not file.is_file() or kept_back:
            self.send_response(fault.get("status", 404))
            if "location" in fault:
                self.send_header("Location", fault["location"])
            if "retry_after_s" in fault:
                self.send_header("Retry-After", str(fault["retry_after_s"]))
            self.send_header("Content-Length", "0")
            served.log.append((path, fault.get("status", 404), 0, 0))
            self.end_headers()
            return
        data = file.read_bytes()
        tag = ("W/" if served.weak else "") + '"' + hashlib.md5(data).hexdigest() + '"'
        start, stop, status = 0, len(data), 200
        wish = self.headers.get("Range")
        if wish and served.ranges and self.headers.get("If-Range", tag) == tag:
            first, last = wish.removeprefix("bytes=").split("-")
            start, stop, status = int(first) + fault.get("shift", 0), min(int(last) + 1 if last else stop, stop), 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        if served.tags:
            self.send_header("ETag", tag)
        if served.lengths:
            self.send_header("Content-Length", str(fault.get("length", stop - start)))
        data = data[start:stop][: fault.get("cut", stop)]
        served.log.append((path, status, start, len(data)))
        self.end_headers()
        if "then" in fault:
            fault["then"]()
        self._send(data)

    def _send(self, data: bytes) -> None:
        piece = int(self.served.bytes_per_s / 20) or len(data) or 1
        for at in range(0, len(data), piece):
            self.wfile.write(data[at : at + piece])
            if self.served.bytes_per_s:
                time.sleep(0.05)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


def serve(folder: Path) -> tuple[Served, Server]:
    """Start a server of a folder, and return what it does and the server."""
    served = Served(folder)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return served, server
