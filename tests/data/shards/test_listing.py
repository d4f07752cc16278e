"""`index.json` of a folder: which indexes need not be opened, and how wrong listings are detected."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mpp.cli.app import main
from mpp.data.shards import store as store_module
from mpp.data.shards.index import index_path
from mpp.data.shards.listing import INDEXES_HELD, LISTING, Indexes, parse_listing, read_listing, write_listing
from mpp.data.shards.pack import pack
from mpp.data.shards.reader import ShardImages
from mpp.errors import UserError
from tests.http_server import Served, serve


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    found, server = serve(folder)
    found.listings = True
    yield found
    server.shutdown()


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the names of the indexes that are opened from now on."""
    found, real = list[str](), store_module.index_shard
    monkeypatch.setattr(store_module, "index_shard", lambda name, *a, **k: found.append(name) or real(name, *a, **k))
    return found


def test_indexes_are_opened_when_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = opened(monkeypatch)
    images = ShardImages(str(folder), key="k")
    assert (images.counts, asked) == ([25, 25, 10], [])
    known = images.fingerprint
    assert asked == []
    data = images.read(1, 3)
    images.read(1, 4)
    assert asked == [images.names[1]]
    (folder / LISTING).unlink()
    plain = ShardImages(str(folder), key="k")
    assert len(asked) == 4
    assert (plain.counts, plain.fingerprint, plain.read(1, 3)) == (images.counts, known, data)


def test_a_shard_that_came_later_is_read_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy2(folder / "shard-000000.tar", folder / "shard-000007.tar")
    asked = opened(monkeypatch)
    images = ShardImages(str(folder), key="k")
    assert images.counts == [25, 25, 10, 25]
    assert asked == [str(folder / "shard-000007.tar")]


@pytest.mark.parametrize("dated", [True, False])
def test_a_shard_that_is_another_one(folder: Path, dated: bool) -> None:
    """The date shows the change at the start. If the date was restored, opening the index shows the change."""
    first, before = folder / "shard-000000.tar", (folder / "shard-000000.tar").stat()
    data = bytearray(first.read_bytes())
    with tarfile.open(first) as tar:
        image = next(m for m in tar if not m.name.endswith(".cls"))
    at = image.offset  # by its name, its first image is no longer an image
    data[at : at + 100] = f"{image.name}.txt".encode().ljust(100, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    first.write_bytes(bytes(data))
    if not dated:
        os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
        index_path(str(first)).unlink()
    images = ShardImages(str(folder), key="k")
    if dated:
        assert images.counts == [24, 25, 10]
    else:
        with pytest.raises(UserError, match="shard-000000.tar: does not match index.json in the same folder"):
            images.read(0, 0)


GOOD = [3, 10_240, 5, "0" * 64, {"hidden": [2, "._a.jpg"]}]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 2, "shards": []}',
        json.dumps({"format": 1, "shards": {"a.tar": GOOD}}),
        "[" * 100_000,
        *(
            json.dumps({"format": 2, "shards": {"a.tar": [*GOOD[:i], value, *GOOD[i + 1 :]]}})
            for i, value in [
                (0, -1),
                (0, 21),
                (0, "3"),
                (0, True),
                (1, 2**70),
                (1, None),
                (3, "0"),
                (3, 7),
                (3, "g" * 64),
                (4, []),
                (4, {"hidden": 1}),
                (4, {"hidden": [1, 2]}),
                (4, {"a reason of theirs": [1, "a.jpg"]}),
            ]
        ),
        json.dumps({"format": 2, "shards": {"a.tar": GOOD[:4]}}),
    ],
)
def test_what_is_no_listing_is_passed_over(text: str, folder: Path) -> None:
    assert parse_listing(text.encode()) == {}
    (folder / LISTING).write_text(text)
    assert ShardImages(str(folder), key="k").counts == [25, 25, 10]


def test_a_good_one(folder: Path) -> None:
    found = parse_listing(json.dumps({"format": 2, "shards": {"a.tar": GOOD, "b.tar": 7}}).encode())
    assert list(found) == ["a.tar"]
    assert sorted(read_listing(folder / LISTING)) == [f"shard-{i:06d}.tar" for i in range(3)]


def test_parts_are_merged(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mpp index` makes one listing if parts from two machines are put into one folder."""
    for part in (1, 2):
        pack(str(image_folder), str(tmp_path / f"part{part}"), images_per_shard=10, workers=1, part=(part, 2))
        assert not (tmp_path / f"part{part}" / LISTING).exists()
        shutil.copytree(tmp_path / f"part{part}", tmp_path / "all", dirs_exist_ok=True)
    (tmp_path / "all" / "dataset.json").unlink()  # describes only one part
    done = CliRunner().invoke(main, ["index", str(tmp_path / "all"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {"images": 60, "labeled": 60, "shards": 6, "faults": [], "left_out": {}}
    asked = opened(monkeypatch)
    assert ShardImages(str(tmp_path / "all"), key="k").counts == [10] * 6
    assert asked == []


def test_what_is_gone_is_not_listed(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    assert write_listing(folder, {})
    assert sorted(read_listing(folder / LISTING)) == ["shard-000000.tar", "shard-000002.tar"]


def test_only_so_many_stay_open() -> None:
    loaded: list[Any] = []
    indexes = Indexes(2 * INDEXES_HELD, {0: "known"}, lambda i: loaded.append(i) or f"shard {i}")  # type: ignore[dict-item,func-returns-value,arg-type,return-value]
    assert list(indexes[0:2]) == ["known", "shard 1"]
    assert (indexes[-1], len(indexes)) == (f"shard {2 * INDEXES_HELD - 1}", 2 * INDEXES_HELD)
    for i in range(2, INDEXES_HELD + 1):
        indexes[i]
    count = len(loaded)
    assert indexes[1] == "shard 1"  # used long ago
    assert indexes[INDEXES_HELD] == f"shard {INDEXES_HELD}"  # used just now
    assert len(loaded) == count + 1
    indexes[2]  # now 3 is the least recently used
    indexes[INDEXES_HELD + 1]
    count = len(loaded)
    assert indexes[2] == "shard 2"
    assert len(loaded) == count, "the least recently used index must be dropped"
    with pytest.raises(IndexError):
        indexes[2 * INDEXES_HELD]


SPEC = "/shard-{000000..000002}.tar"


def test_beside_remote_shards(served: Served, folder: Path, tmp_path: Path) -> None:
    """One request at the start replaces one for each shard. An index is requested when its shard is read."""
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(tmp_path / "cache"))
    local = ShardImages(str(folder), key="k")
    assert [line[0] for line in served.log] == [f"/{LISTING}"]
    assert (images.counts, images.fingerprint) == (local.counts, local.fingerprint)
    images.require(range(3), "all take")
    assert images.read(1, 3) == local.read(1, 3)
    assert {line[0] for line in served.log if line[0].endswith(".npz")} == {"/shard-000001.tar.index.npz"}
    for signature in ("ab", "a/b"):
        served.log.clear()
        signed = f"{served.url}/shard-000000.tar?signature={signature}"
        assert ShardImages(signed, key="k", cache_dir=str(tmp_path / signature)).counts == [25]
        assert [line[0] for line in served.log] == ["/shard-000000.tar.index.npz"]


def test_of_remote_shards_that_changed(served: Served, folder: Path, tmp_path: Path) -> None:
    """If the listing is wrong, the index shows it when it is opened."""
    shutil.copy(folder / "shard-000001.tar", folder / "shard-000000.tar")
    index_path(str(folder / "shard-000000.tar")).unlink()
    images = ShardImages(served.url + SPEC, key="k", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"000\.tar: does not match index.json in the same folder"):
        images.read(0, 0)
    assert images.read(1, 0)
