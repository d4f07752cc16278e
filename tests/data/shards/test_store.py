"""Remote shards, served by a real HTTP server on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpp.cli.app import main
from mpp.data.shards import remote
from mpp.data.shards import store as store_module
from mpp.data.shards.index import index_path
from mpp.data.shards.reader import ShardImages
from mpp.data.shards.samples import ANOTHER_IMAGE
from mpp.data.shards.store import Store
from mpp.data.walk import HIDDEN
from mpp.errors import MppWarning, UserError
from tests.conftest import drawn_image, encoded
from tests.data.test_labeled import tar_with
from tests.data.test_loader import shard_of
from tests.http_server import Served, serve

pytestmark = pytest.mark.filterwarnings("ignore:.*asking again:mpp.errors.MppWarning")
SPEC = "/shard-{000000..000002}.tar"


@pytest.fixture
def served(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(store_module, "PAUSE_S", 0.001)
    shutil.copytree(shards, tmp_path / "served")
    found, server = serve(tmp_path / "served")
    yield found
    server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cached_bytes(folder: Path) -> int:
    """Return the size in bytes of all shards that a cache holds or is fetching, at one moment."""
    if not folder.exists():
        return 0
    with open(folder / "room.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nothing is added or deleted meanwhile
        files: dict[int, int] = {}  # by inode, so that a file that is renamed meanwhile counts once
        for path in folder.iterdir():
            if path.name.endswith((".tar", ".tar.part")):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    files[found.st_ino] = found.st_size
        return sum(files.values())


def kept(cache: Path) -> list[str]:
    """Return the names of the files in a cache, except locks and indexes."""
    return sorted(p.name for p in (cache / "shards").iterdir() if p.suffix not in (".lock", ".npz"))


def test_remote_shards_are_as_local_ones_and_copied_once(served: Served, shards: Path, cache: Path) -> None:
    local = ShardImages(str(shards), key="data.shards")
    for _ in range(2):
        images = ShardImages(served.url + SPEC, key="data.shards", cache_dir=str(cache))
        assert images.counts == [25, 25, 10]
        assert images.fingerprint == local.fingerprint
        assert [images.read(*at) for at in [(1, 3), (0, 0), (2, 9)]] == [
            local.read(*at) for at in [(1, 3), (0, 0), (2, 9)]
        ]
        assert images.name(1, 3).rpartition("/")[2] == local.name(1, 3).rpartition("/")[2]
        assert images.read_label(1, 3) == local.read_label(1, 3)
    assert served.whole() == 3


def test_with_indexes_beside_them_shards_are_fetched_when_they_are_read(served: Served, cache: Path) -> None:
    images = ShardImages(served.url + SPEC, key="data.shards", cache_dir=str(cache))
    assert images.counts == [25, 25, 10]
    assert (served.whole(".npz"), served.whole(".tar")) == (3, 0)
    images.read(1, 3)
    assert served.whole() == 1


def test_without_indexes_beside_them_each_shard_is_fetched_once_to_be_indexed(served: Served, cache: Path) -> None:
    served.indexes = False
    limit = 1.5 * max(p.stat().st_size for p in served.folder.glob("*.tar"))
    for _ in range(2):
        images = ShardImages(served.url + SPEC, key="data.shards", cache_dir=str(cache), cache_limit_bytes=limit)
        assert images.counts == [25, 25, 10]
    assert served.whole() == 3
    assert sum((cache / "shards" / name).stat().st_size for name in kept(cache)) <= limit


def test_a_few_images_are_read_without_their_shards(served: Served, shards: Path, cache: Path) -> None:
    images, local = (ShardImages(s, key="k", cache_dir=str(cache)) for s in (served.url + SPEC, str(shards)))
    assert images.read(1, 3, few=True) == local.read(1, 3)
    offset, size = local.indexes[1].table[3, :2]
    assert served.log[-1][1:] == (206, offset - 512, 512 + size), "must include the header, which identifies it"
    assert kept(cache) == []
    assert [images.read(1, row, few=True) for row in range(25)] == [local.read(1, row) for row in range(25)]
    assert served.whole() == 1, "after more than a few images, the whole shard must be fetched"
    served.ranges = False
    assert images.read(0, 3, few=True) == local.read(0, 3)
    assert served.whole() == 3, "if the server sends no parts, the whole shard must be fetched"


def test_what_is_left_out_of_a_remote_shard_is_named_without_secrets(served: Served, cache: Path) -> None:
    """The server may have a separate index for each image_extension."""
    image = encoded(drawn_image(0))
    tar_with(served.folder / "pairs.tar", {"a.jpg": image, "a.seg.png": image, "._a.jpg": b"?"})
    url = f"{served.url}/pairs.tar?X-Amz-Signature=SECRET"
    images = ShardImages(url, key="k", cache_dir=str(cache))
    assert (images.counts, {reason: count for reason, (count, _) in images.left_out.found.items()}) == (
        [1],
        {HIDDEN: 1, ANOTHER_IMAGE: 1},
    )
    assert "SECRET" not in str(images.left_out.found)
    assert "pairs.tar" in str(images.left_out)
    masks = ShardImages(url, key="k", cache_dir=str(cache), image_extension="seg.png")
    assert (masks.counts, masks.read(0, 0)) == ([1], image)
    assert "SECRET" not in CliRunner().invoke(main, ["index", url, "--cache-dir", str(cache)]).output


def test_a_part_of_another_shard_of_the_same_size_is_not_believed(served: Served, cache: Path, tmp_path: Path) -> None:
    """Otherwise images would be read at the offsets of the other shard, from the middle of one image or of two."""
    (tmp_path / "others").mkdir()
    for name, sizes in (("a", (3000, 2000, 9000)), ("b", (9000, 2000, 3000))):
        shard = shard_of(tmp_path / "others" / f"{name}.tar", [bytes([n % 7]) * n for n in sizes])
        os.replace(shard, served.folder / f"{name}.tar")
    assert (served.folder / "a.tar").stat().st_size == (served.folder / "b.tar").stat().st_size
    images = ShardImages(f"{served.url}/a.tar", key="k", cache_dir=str(cache))
    images.store.target(images.names[0]).unlink()
    assert images.read(0, 1, few=True) == bytes([2000 % 7]) * 2000
    os.replace(served.folder / "b.tar", served.folder / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar: changed since it was indexed"):
        images.read(0, 1, few=True)


def test_a_part_cut_short_is_not_believed(served: Served, shards: Path, cache: Path) -> None:
    images, local = (ShardImages(s, key="k", cache_dir=str(cache)) for s in (served.url + SPEC, str(shards)))
    served.faults.append({"cut": 10})
    assert images.read(1, 3, few=True) == local.read(1, 3)


def test_a_copy_that_leaves_while_it_is_looked_at_comes_again(
    served: Served, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, local = (ShardImages(s, key="k", cache_dir=str(cache)) for s in (served.url + SPEC, str(shards)))
    real, times = store_module.index_shard, 0

    def leaves(path: str, cache_dir: str, **keys: Any) -> object:
        nonlocal times
        times += 1
        if times == 1:
            os.unlink(path)
        return real(path, cache_dir, **keys)

    expected = local.read(1, 3)
    monkeypatch.setattr(store_module, "index_shard", leaves)
    assert images.read(1, 3) == expected
    assert times == 2


def test_an_answer_cut_short_goes_on_where_it_ended(served: Served, shards: Path, cache: Path) -> None:
    served.faults += [{"cut": 1000}, {"cut": 3000}]
    path = Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    size = (shards / "shard-000002.tar").stat().st_size
    assert path is not None
    assert path.read_bytes() == (shards / "shard-000002.tar").read_bytes()
    assert [entry[1:] for entry in served.log] == [(200, 0, 1000), (206, 1000, 3000), (206, 4000, size - 4000)]


@pytest.mark.parametrize(("how", "value"), [("ranges", False), ("tags", False), ("weak", True)])
def test_without_parts_or_versions_it_starts_again(
    how: str, value: bool, served: Served, shards: Path, cache: Path
) -> None:
    setattr(served, how, value)
    served.faults += [{"cut": 1000}, {"cut": 5000}]
    path = Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    assert path is not None
    assert path.read_bytes() == (shards / "shard-000002.tar").read_bytes()
    assert served.whole() == 1


@pytest.mark.parametrize("longer", [0, 20 * 512])
def test_a_shard_that_changes_while_it_is_copied_is_copied_anew(longer: int, served: Served, cache: Path) -> None:
    file = served.folder / "shard-000002.tar"
    other = shard_of(file.with_suffix(".other"), [b"x" * 600] * 10).read_bytes() + bytes(longer)

    def change() -> None:
        file.write_bytes(other)

    served.faults.append({"cut": 5000, "then": change})
    path = Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    assert path is not None
    assert path.read_bytes() == other
    assert [status for _, status, _, _ in served.log] == [200, 200], "only a part of the first version may be requested"


def test_another_part_than_was_asked_for_is_not_believed(served: Served, cache: Path) -> None:
    served.faults += [{"cut": 5000}, {"shift": 512}]
    path = Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    assert path is not None
    assert path.read_bytes() == (served.folder / "shard-000002.tar").read_bytes()
    assert [status for _, status, _, _ in served.log] == [200, 206, 200]


def test_a_library_goes_on_in_no_other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(remote, "SCHEMES", ("memory",))
    fsspec.filesystem("memory").pipe("/a.bin", b"0123456789")
    with remote.opened("memory://a.bin", start=4) as answer:  # a part of any version
        assert (answer.start, answer.stream.read()) == (4, b"456789")
    with remote.opened("memory://a.bin", start=4, version="older") as answer:
        assert (answer.start, answer.stream.read()) == (0, b"0123456789")


def test_a_server_that_sends_a_part_of_another_file_is_not_believed(
    served: Served, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = served.folder / "shard-000002.tar"
    real = remote.urllib.request.Request.add_header
    monkeypatch.setattr(  # as if the server ignored If-Range
        remote.urllib.request.Request, "add_header", lambda self, k, v: None if k == "If-Range" else real(self, k, v)
    )
    other = bytes(512) * 40 + file.read_bytes()
    served.faults.append({"cut": 5000, "then": lambda: file.write_bytes(other[512 * 40 :] + bytes(1024))})
    path = Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    assert path is not None
    assert path.read_bytes() == file.read_bytes()
    assert [status for _, status, _, _ in served.log] == [200, 206, 200]


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_in_trouble_is_asked_again(status: int, served: Served, cache: Path) -> None:
    served.faults += [{"status": status}] * 6
    assert Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    assert len(served.log) == 7


def test_a_server_is_left_alone_as_long_as_it_asks(served: Served, cache: Path) -> None:
    served.faults.append({"status": 503, "retry_after_s": 1})
    began = time.monotonic()
    assert Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    assert time.monotonic() - began >= 1


def test_what_cannot_be_had_is_one_line_and_leaves_nothing(served: Served, cache: Path) -> None:
    with pytest.raises(UserError, match=r"none\.tar: .*404.* \(tried 1 times\)"):
        Store(str(cache)).fetch(served.url + "/none.tar")
    served.faults += [{"status": 403}] + [{"status": 500}] * 99
    with pytest.raises(UserError, match=r"000\.tar: .*403.* \(tried 1 times\)"):
        Store(str(cache)).fetch(served.url + "/shard-000000.tar")
    with pytest.raises(UserError, match=r"000\.tar: .*500.* \(tried 8 times\)"):
        Store(str(cache)).fetch(served.url + "/shard-000000.tar")
    served.faults.clear()
    served.faults += [{"cut": 1000}] * 99
    served.tags = False
    with pytest.raises(UserError, match=r"1000 of \d+ bytes arrived \(tried 8 times\)"):
        Store(str(cache)).fetch(served.url + "/shard-000000.tar")
    assert kept(cache) == []


def test_a_wrong_length_is_not_believed(served: Served, cache: Path) -> None:
    served.faults += [{"length": 1000}, {"length": 10_000_000}]
    with pytest.raises(UserError, match=r"000\.tar: the download is not a shard: cut off"):
        Store(str(cache)).fetch(served.url + "/shard-000000.tar")
    path = Store(str(cache)).fetch(served.url + "/shard-000000.tar")
    assert path is not None
    assert path.read_bytes() == (served.folder / "shard-000000.tar").read_bytes()
    assert [status for name, status, *_ in served.log if name.endswith(".tar")] == [200, 200, 206]


def test_the_cache_is_bounded_and_the_oldest_leaves(served: Served, shards: Path, cache: Path) -> None:
    size = (shards / "shard-000000.tar").stat().st_size
    before = Store(str(cache), limit_bytes=10 * size)
    paths = [before.fetch(f"{served.url}/shard-00000{i}.tar") for i in (0, 1)]
    before.fetch(f"{served.url}/shard-000000.tar")  # used again, so that the other shard is older
    last = Store(str(cache), limit_bytes=1.9 * size).fetch(f"{served.url}/shard-000002.tar")
    assert [path is not None and path.exists() for path in (*paths, last)] == [True, False, True]


def test_what_is_read_stays(served: Served, shards: Path, cache: Path) -> None:
    size = (shards / "shard-000000.tar").stat().st_size
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache), cache_limit_bytes=2.1 * size)
    for shard in (0, 1):
        images.read(shard, 0)
        path = images.store.target(images.names[shard])
        os.utime(path, ns=(time.time_ns() - (10 - shard) * 10**9, path.stat().st_mtime_ns))  # last used a while ago
    images.read(0, 1)
    images.read(2, 0)
    there = [images.store.target(name).exists() for name in images.names]
    assert there == [True, False, True], "the second shard was used least recently"


def test_a_server_that_says_no_length(served: Served, shards: Path, cache: Path) -> None:
    served.lengths = False
    size = (shards / "shard-000000.tar").stat().st_size
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache), cache_limit_bytes=1.9 * size)
    for shard in range(3):
        images.read(shard, 0)
    assert cached_bytes(cache / "shards") <= 1.9 * size
    with pytest.raises(UserError, match=r"data\.cache_limit_gb: .*takes"):
        Store(str(cache / "other"), limit_bytes=30_000).fetch(served.url + "/shard-000000.tar")
    (served.folder / "endless.tar").write_bytes(bytes(30 << 20))
    served.log.clear()
    with pytest.raises(UserError, match=r"data\.cache_limit_gb: .*takes"):
        Store(str(cache / "third"), limit_bytes=3 << 20).fetch(served.url + "/endless.tar")


def test_the_bound_holds_at_every_moment(served: Served, shards: Path, cache: Path) -> None:
    """Four readers of three shards share a cache for two. It never exceeds its bound, and all images are correct."""
    local = ShardImages(str(shards), key="k")
    sizes = sorted(i.size_bytes for i in local.indexes)
    limit, wrong, most, ended = sizes[1] + sizes[2] + 100, [], 0, threading.Event()
    served.bytes_per_s = 2e6

    def read(reader: int) -> None:
        images = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache), cache_limit_bytes=limit)
        for n in range(40):
            at = ((n + reader) // 4 % 3, n % 10)
            if images.read(*at) != local.read(*at):
                wrong.append(at)

    def measured() -> None:
        nonlocal most
        while not ended.is_set():
            most = max(most, cached_bytes(cache / "shards"))

    watching = threading.Thread(target=measured)
    watching.start()
    readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    ended.set()
    watching.join()
    assert not wrong
    assert 0 < most <= limit
    assert served.whole() > 3, "some shards must have been deleted and fetched again"


@pytest.mark.slow
def test_four_processes_fetch_a_shard_once(served: Served, cache: Path) -> None:
    served.bytes_per_s = 100_000
    code = (
        "import sys; from mpp.data.shards.reader import ShardImages\n"
        "images = ShardImages(sys.argv[1], key='k', cache_dir=sys.argv[2])\n"
        "print([len(images.read(i, 5)) for i in range(3)])"
    )
    command = [sys.executable, "-c", code, served.url + SPEC, str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert [process.returncode for process in running] == [0] * 4
    assert served.whole() == 3


def test_what_a_dead_process_left_goes_when_room_is_needed(served: Served, shards: Path, cache: Path) -> None:
    store = Store(str(cache), limit_bytes=1.2 * (shards / "shard-000000.tar").stat().st_size)
    half = store.target(served.url + "/shard-000001.tar")
    half.parent.mkdir(parents=True)
    half.with_name(half.name + ".part").write_bytes(bytes(30_000))
    half.with_name(half.name + ".lock").touch()
    assert store.fetch(served.url + "/shard-000000.tar")
    assert [name.endswith(".tar") for name in kept(cache)] == [True]


def test_what_a_living_process_fetches_stays(served: Served, shards: Path, cache: Path) -> None:
    size = (shards / "shard-000000.tar").stat().st_size
    store = Store(str(cache), limit_bytes=2.2 * size)
    other = store.target(served.url + "/shard-000001.tar")
    other.parent.mkdir(parents=True)
    half = other.with_name(other.name + ".part")
    half.write_bytes(bytes(30_000))
    with open(other.with_name(other.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for shard in (0, 2):
            assert store.fetch(f"{served.url}/shard-00000{shard}.tar")
        assert half.exists()
    assert store.fetch(served.url + "/shard-000001.tar")


def test_a_copy_that_left_takes_no_space(served: Served, cache: Path) -> None:
    """No file of the cache may stay open, because a deleted file takes space until it is closed."""
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache))
    for shard in range(3):
        images.read(shard, 0)
    held = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert not [place for place in held if str(cache) in place]


def test_a_shard_larger_than_the_cache_is_refused(served: Served, cache: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_limit_gb: .*000\.tar takes 6.*e-05 GB; the limit is 3e-05"):
        Store(str(cache), limit_bytes=30_000).fetch(served.url + "/shard-000000.tar")
    assert kept(cache) == []


def test_more_than_the_cache_holds_is_refused_where_all_is_needed(served: Served, cache: Path) -> None:
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache), cache_limit_bytes=100_000)
    with pytest.raises(UserError, match=r"data\.cache_limit_gb: all take 0\.000\d+ GB .* the limit is 0\.0001, or"):
        images.require(range(3), "all take", ", or else")
    images.require([0], "one takes")
    local = ShardImages(str(served.folder), key="k", cache_limit_bytes=1)
    local.require(range(3), "local ones take no room")


@pytest.mark.parametrize("fetched", [False, True])
def test_a_shard_that_is_another_than_its_index_says(fetched: bool, served: Served, cache: Path) -> None:
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache))
    if fetched:
        images.read(0, 0)
        images.store.target(images.names[0]).unlink()  # as if it had been deleted from the cache
    shutil.copy(served.folder / "shard-000001.tar", served.folder / "shard-000000.tar")
    with pytest.raises(UserError, match=r"000\.tar: changed since it was indexed; start again"):
        images.read(0, 0)
    again = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache))
    assert again.read(0, 0) == again.read(1, 0)


def test_an_index_from_elsewhere_is_not_believed(served: Served, tmp_path: Path, cache: Path) -> None:
    shard = shard_of(tmp_path / "other.tar", [b"x" * 600, b"y"])
    ShardImages(str(shard), key="k")
    shutil.copy(index_path(str(shard)), index_path(str(served.folder / "shard-000002.tar")))
    index_path(str(served.folder / "shard-000001.tar")).write_bytes(b"<html>")
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(cache))
    assert images.counts == [25, 25, 2], "the index is plausible, but belongs to another shard"
    assert served.whole() == 1, "the file is not an index, so the shard must be fetched"
    with pytest.raises(UserError, match=r"002\.tar: changed since it was indexed"):
        images.read(2, 0, few=True)


def test_an_answer_that_is_no_shard_never_enters_the_cache(served: Served, cache: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: the download is not a shard: "):
        Store(str(cache)).fetch(served.url + "/dataset.json")
    assert kept(cache) == []


@pytest.mark.parametrize(
    "bad", ["http://[bad/a.tar", "http://127.0.0.1:bad/a.tar", "http://127.0.0.1:1/a b.tar", "hf://x"]
)
def test_urls_that_cannot_be_opened(bad: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "PAUSE_S", 0.001)
    with pytest.raises(UserError) as error:
        Store(str(cache)).fetch(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [
        "ftp://h/a.tar",
        "file:///etc/a.tar",
        "zip://x::http://h/a.tar",
        "simplecache::s3://b/a.tar",
        "s3://b/a.zip::memory://x",
    ],
)
def test_other_schemes_are_refused(bad: str, cache: Path) -> None:
    with pytest.raises(UserError, match="cannot be read; use local files, http"):
        Store(str(cache)).fetch(bad)
    with pytest.raises(UserError, match="cannot be read; use local files, http"):
        Store(str(cache)).index(bad)


def test_a_library_that_is_missing_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/a\.tar: .*gcsfs.*; pip install 'gcsfs"):
        Store(str(cache)).fetch("gs://bucket/a.tar")


def test_a_server_may_name_another_place_but_none_of_another_kind(served: Served, cache: Path) -> None:
    served.faults.append({"status": 302, "location": served.url + "/shard-000002.tar"})
    assert Store(str(cache)).fetch(served.url + "/moved.tar")
    for location in ("ftp://127.0.0.1/a.tar", "file:///etc/passwd"):
        served.faults.append({"status": 302, "location": location})
        with pytest.raises(UserError, match=r"000\.tar: .*(is redirected to ftp:.*; only|'file:.*' is not allowed)"):
            Store(str(cache)).fetch(served.url + "/shard-000000.tar")


def test_it_says_that_it_asks_again(served: Served, cache: Path) -> None:
    served.faults += [{"status": 503}] * 3
    with pytest.warns(MppWarning, match=r"002\.tar: HTTP Error 503.*; asking again") as told:
        assert Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    assert len(told) == 1


def test_a_password_in_the_url_is_told_to_the_server_and_to_nobody_else(served: Served, cache: Path) -> None:
    served.login = "Basic dXNlcjpwQHNz"  # user:p@ss
    with pytest.raises(UserError, match="401"):
        Store(str(cache)).fetch(served.url + "/shard-000002.tar")
    with_password = served.url.replace("://", "://user:p%40ss@")
    assert Store(str(cache)).fetch(with_password + "/shard-000002.tar")
    with pytest.raises(UserError, match=r"://\*\*\*@127\.0\.0\.1:\d+/none\.tar: .*404"):
        Store(str(cache)).fetch(with_password + "/none.tar")


def test_a_cache_that_cannot_be_made(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file/cache/shards: Not a directory"):
        images.read(0, 0)
