"""`mpp pack` reads Parquet files of a hub that this machine runs, through the Hub's own client."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import command, drawn_image, encoded

REPOSITORY = "/api/datasets/somebody/photos"


@dataclass
class Hub:
    """A data set with its files, and the requests that it answered."""

    files: dict[str, bytes]
    url: str = ""
    asked: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.hub.asked.append(path)
        if path.startswith(f"{REPOSITORY}/tree/main"):
            folder = path.removeprefix(f"{REPOSITORY}/tree/main").strip("/")
            return self.answer(self.listed(folder, "recursive=true" in query.lower()))
        if path == REPOSITORY:
            return self.answer({"id": "somebody/photos", "sha": "a" * 40})
        name = path.removeprefix("/datasets/somebody/photos/resolve/main/")
        if name in self.hub.files:
            return self.part_of(self.hub.files[name])
        self.answer({"error": "Repository not found"}, 404)

    do_HEAD = do_GET

    def listed(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        below = [name for name in self.hub.files if not folder or name.startswith(f"{folder}/")]
        files = [name for name in below if recursive or "/" not in name.removeprefix(folder).strip("/")]
        inner = {name.rpartition("/")[0] for name in below if name not in files}
        return [
            *({"type": "directory", "path": name, "oid": "b" * 40} for name in sorted(inner)),
            *({"type": "file", "path": n, "size": len(self.hub.files[n]), "oid": "c" * 40} for n in files),
        ]

    def part_of(self, data: bytes) -> None:
        first, _, last = (self.headers.get("Range") or f"bytes=0-{len(data) - 1}").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1, len(data))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:end])

    def answer(self, found: object, status: int = 200) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Code", "RepoNotFound" if status == 404 else "")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """Return a hub with 20 images in two files of three row groups each."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = {"README.md": b"photos"}
    for part in range(2):
        images = [encoded(drawn_image(i), "PNG") for i in range(10 * part, 10 * part + 10)]
        stream = io.BytesIO()
        parquet.write_table(pyarrow.table({"image": images}), stream, row_group_size=4)
        files[f"data/train-{part}.parquet"] = stream.getvalue()
    found = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("somebody/photos", 0, "20 images, no labels, 1 shard"),
        ("somebody/photos/data/*-1.parquet", 0, "10 images, no labels, 1 shard"),
        (
            "somebody/photos/*.parquet",
            2,
            "the Hub may have made some: hf://datasets/somebody/photos@refs/convert/parquet",
        ),
        ("somebody/none", 2, "hf://datasets/somebody/none: FileNotFoundError: "),
    ],
)
def test_parquet_of_the_hub(place: str, status: int, words: str, hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = command("pack", f"hf://datasets/{place}", tmp_path / "shards", "--workers", "1", environment=own)
    assert done.returncode == status, done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    of_files = [path for path in hub.asked if "/resolve/" in path]
    assert len(of_files) <= 4, "a small file must be read by one request each time it is opened"
