"""Remote shards, from a real HTTP server on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mpp.data import store as store_module
from mpp.data.images import ShardImages
from mpp.data.store import Store
from mpp.errors import UserError


class Server(SimpleHTTPRequestHandler):
    """Serves a folder; counts requests; cuts the first `cuts` answers short."""

    requests = 0
    cuts = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if type(self).cuts > 0:
            type(self).cuts -= 1
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Server.requests = Server.cuts = 0
    monkeypatch.setattr(store_module.time, "sleep", lambda s: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_remote_shards_are_copied_once(url: str, shards: Path, tmp_path: Path) -> None:
    spec = url + "/shard-{000000..000002}.tar"
    for _ in range(2):
        images = ShardImages(spec, key="data.shards", cache_dir=str(tmp_path))
        assert images.counts == [25, 25, 10]
    assert Server.requests == 3
    local = ShardImages(str(shards), key="data.shards")
    assert images.read(1, 3) == local.read(1, 3)
    assert images.fingerprint == local.fingerprint


def test_an_answer_cut_short_is_asked_for_again(url: str, shards: Path, tmp_path: Path) -> None:
    Server.cuts = 2
    path = Store(str(tmp_path)).path(url + "/shard-000002.tar")
    assert Path(path).read_bytes() == (shards / "shard-000002.tar").read_bytes()
    assert Server.requests == 3


def test_what_cannot_be_had_is_one_line_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.tar: .*404.* \(tried 1 times\)"):
        Store(str(tmp_path)).path(url + "/none.tar")
    Server.cuts = 99
    with pytest.raises(UserError, match=r"1000 of 100000 bytes arrived \(tried 5 times\)"):
        Store(str(tmp_path)).path(url + "/shard-000000.tar")
    assert not [p for p in (tmp_path / "shards").iterdir() if p.suffix not in (".lock", ".part")]


def test_the_cache_is_bounded(url: str, shards: Path, tmp_path: Path) -> None:
    size = (shards / "shard-000000.tar").stat().st_size
    before = Store(str(tmp_path), limit_bytes=10 * size)
    paths = [Path(before.path(f"{url}/shard-00000{i}.tar")) for i in (0, 1)]
    before.path(f"{url}/shard-000000.tar")  # used again: the other one is older now
    last = Path(Store(str(tmp_path), limit_bytes=1.9 * size).path(f"{url}/shard-000002.tar"))
    assert (paths[0].exists(), paths[1].exists(), last.exists()) == (True, False, True)


def test_more_shards_than_the_cache_holds_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_limit_gb: [12] shards of this run take .* allowed are 0\.000"):
        ShardImages(url + "/shard-{000000..000002}.tar", key="k", cache_dir=str(tmp_path), cache_limit_bytes=30_000)


def test_an_answer_that_is_no_shard_never_enters_the_cache(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: what arrived is no shard: "):
        Store(str(tmp_path)).path(url + "/dataset.json")
    assert not [p for p in (tmp_path / "shards").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    "bad", ["http://[bad/a.tar", "http://127.0.0.1:bad/a.tar", "http://127.0.0.1:1/a b.tar", "hf://x"]
)
def test_urls_that_cannot_be_opened(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.time, "sleep", lambda s: None)
    with pytest.raises(UserError) as error:
        Store(str(tmp_path)).path(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", ["ftp://h/a.tar", "file:///etc/a.tar", "zip://x::http://h/a.tar", "simplecache::s3://b/a.tar"]
)
def test_other_schemes_are_refused(bad: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not read; allowed are local files and http"):
        Store(str(tmp_path)).path(bad)


def test_a_local_path_is_itself(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).path("/data/a.tar") == "/data/a.tar"
    assert not list(tmp_path.iterdir())
