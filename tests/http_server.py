"""A folder served over HTTP on this machine, by a server that can be slow, break off, refuse or change its mind."""

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
    """What a server did, and what it is to do to the next requests for shards."""

    folder: Path
    ranges: bool = True
    """Whether it answers a wish for a part with that part."""
    tags: bool = True
    """Whether it says by which version of a file its answer is."""
    weak: bool = False
    """Whether these versions stand for what a file means, not for its bytes."""
    lengths: bool = True
    indexes: bool = True
    """Whether it gives out the indexes beside the shards."""
    listings: bool = False
    """Whether it gives out index.json, of all of them."""
    bytes_per_s: float = 0.0
    faults: deque[dict[str, Any]] = field(default_factory=deque)
    """status, retry_after_s, location; or shift: by which a part begins later than it was asked for; cut: bytes that are sent; with length: that is claimed; then: done meanwhile"""
    log: list[tuple[str, int, int, int]] = field(default_factory=list)
    """(path, status, first byte, bytes sent) of each request"""
    url: str = ""
    login: str | None = None
    """What it wants to see as Authorization."""

    def whole(self, name: str = ".tar") -> int:
        """How often a file whose name ends so was sent from its first byte to its last."""
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
        """One who hangs up is no news."""


def serve(folder: Path) -> tuple[Served, Server]:
    """A server of this folder, and what it does."""
    served = Served(folder)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return served, server
