"""An export is verified and sent to a hub that this machine runs."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import mpp
from mpp.encoders.folder import Origin
from mpp.exchange.import_weights import export_model
from tests.conftest import command

pytestmark = pytest.mark.slow


@dataclass
class Hub:
    """The requests that a hub received, and its files."""

    url: str = ""
    status: int = 200
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        first = lines[0] if lines else {}
        self.hub.asked.append((self.path, first))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.status != 200:
            return self.answer({"error": "no such right"}, self.hub.status)
        if self.path == "/api/repos/create":
            name = f"{first.get('organization', 'someone')}/{first['name']}"
            return self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})
        if "/preupload/" in self.path:
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in first["files"]]}
            )
        if "/commit/" in self.path:
            for line in lines[1:]:
                self.hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"success": True, "commitUrl": f"{self.hub.url}/o/n/commit/1", "commitOid": "1" * 40})
        return self.answer({})

    def do_GET(self) -> None:
        self.hub.asked.append((self.path, {}))
        self.answer({"error": "not here"}, 404)

    def answer(self, found: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": found}))
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0
    )
    origin = Origin(mean=[0.5] * 3, std=[0.5] * 3, input_size=(3, 16, 16), made="Made.", limits="None.")
    export_model(model, tmp_path_factory.mktemp("up") / "e", origin)
    return Path(tmp_path_factory.getbasetemp()) / "up0" / "e"


def sent(hub: Hub, *words: str | Path) -> Any:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_abc", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return command("upload", *words, environment=own)


def test_it_is_sent_as_it_is(hub: Hub, exported: Path) -> None:
    done = sent(hub, exported, "someone/photos")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/someone/photos"
    assert hub.files == {p.name: p.read_bytes() for p in exported.iterdir()}
    created = dict(hub.asked)["/api/repos/create"]
    assert created == {"name": "photos", "organization": "someone", "visibility": "private"}
    assert hub.tokens == {"Bearer hf_abc"}


def test_what_is_refused(hub: Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mpp.UserError, match="someone/photos/third: Repo id must") as error:
        mpp.upload(exported, "someone/photos/third")
    assert "\n" not in str(error.value)
    hub.status = 403
    done = sent(hub, exported, "someone/photos")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"someone/photos: cannot be sent to {hub.url}: " in done.stderr
    assert "hf_abc" not in done.stderr
    hub.asked.clear()
    with monkeypatch.context() as patched:
        patched.setenv("HF_TOKEN", "hf_ä")
        with pytest.raises(mpp.UserError, match="someone/photos: HF_TOKEN: contains invalid characters"):
            mpp.upload(exported, "someone/photos")
    with pytest.raises(mpp.UserError, match="not an export; run `mpp export` first"):
        mpp.upload(tmp_path, "someone/photos")
    (tmp_path / "e").mkdir()
    for file in exported.iterdir():
        (tmp_path / "e" / file.name).write_bytes(file.read_bytes()[:-1])
    with pytest.raises(mpp.UserError):
        mpp.upload(tmp_path / "e", "someone/photos")
    assert not hub.asked
