"""Remote shards: servers that are slow, break off, refuse and change their files, and caches smaller than the data."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import drawn_image, encoded
from tests.data.shards.test_store import cached_bytes
from tests.data.test_loader import shard_of
from tests.faults.conftest import Bench
from tests.faults.processes import left, status, steps_logged
from tests.http_server import Served, serve

SHARDS = 8
NEARLY_IN_ORDER = {"data.lanes": 2, "data.window": 10, "data.workers": 1, "optim.steps": 30}
"""Changes that make a run read a few shards at a time."""


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with shards of 10 images each, and with their indexes."""
    from mpp.data.shards.index import index_shard

    folder = tmp_path_factory.mktemp("many")
    for i in range(SHARDS):
        images = [encoded(drawn_image(10 * i + j), "PNG") for j in range(10)]
        index_shard(str(shard_of(folder / f"s{i}.tar", images)), str(folder))
    return folder


@pytest.fixture
def local(bench: Bench, many: Path) -> Any:
    """Return what a run on the local shards leaves."""
    return bench.reference("pretrain", 2, **{"data.shards": str(many)}, **NEARLY_IN_ORDER)


@pytest.fixture
def served(many: Path, folder: Path) -> Iterator[Served]:
    shutil.copytree(many, folder / "served")
    found, server = serve(folder / "served")
    yield found
    server.shutdown()


def remote_recipe(bench: Bench, url: str, *, cache_shards: float = SHARDS, **changes: Any) -> Path:
    size = max(p.stat().st_size for p in (bench.folder / "served").glob("*.tar"))
    places = {"data.shards": f"{url}/s{{0..{SHARDS - 1}}}.tar", "data.cache_dir": str(bench.folder / "cache")}
    limit = {"data.cache_limit_gb": cache_shards * size / 1e9}
    return bench.recipe("pretrain", **{**places, **limit, **NEARLY_IN_ORDER, **changes})


@pytest.mark.promise("A slow server that breaks connections gives the losses and weights of local files")
@pytest.mark.parametrize("indexes", [True, False])
def test_a_bad_server(indexes: bool, bench: Bench, served: Served, local: Any) -> None:
    served.indexes, served.bytes_per_s = indexes, 400_000
    bad: list[dict[str, Any]] = [{"cut": 3000}, {"status": 500}, {"status": 503}, {"cut": 0}, {"status": 429}]
    served.faults += bad * 2
    path = remote_recipe(bench, served.url)
    bench.start("pretrain", path).ends_well()
    assert left(bench.folder / "run") == local
    assert not served.faults, "every fault must have happened"
    assert served.whole() <= SHARDS, "each shard must be fetched once for both processes and their workers"
    bench.count("broken answers", 10)


@pytest.mark.promise("A cache smaller than the data stays within its limit; losses equal those of local files")
@pytest.mark.parametrize("cache_shards", [4.1, pytest.param(6, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("indexes", [True, False])
def test_a_small_cache(indexes: bool, cache_shards: float, bench: Bench, served: Served, local: Any) -> None:
    served.indexes = indexes
    path = remote_recipe(bench, served.url, cache_shards=cache_shards)
    limit = cache_shards * max(p.stat().st_size for p in served.folder.glob("*.tar"))
    run, most = bench.start("pretrain", path), 0

    def over() -> bool:
        nonlocal most
        most = max(most, cached_bytes(bench.folder / "cache" / "shards"))
        return None not in run.codes()

    while not over():
        pass
    run.ends_well()
    assert 0 < most <= limit
    assert left(bench.folder / "run") == local


@pytest.mark.promise("A cache too small for the shards that are read at once is refused before the first step")
def test_a_cache_that_is_too_small(bench: Bench, served: Served) -> None:
    run = bench.start("pretrain", remote_recipe(bench, served.url, cache_shards=1.5), world=1)
    assert run.wait() == [2]
    assert "data.cache_limit_gb: 2 lanes with windows of 10 samples take" in run.said()
    assert "or lower data.lanes or data.window" in run.said()
    assert served.whole() == 0


@pytest.mark.promise("A full disk under the cache stops the run at once and is named")
def test_a_full_disk_under_the_cache(bench: Bench, served: Served, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
    path = remote_recipe(bench, served.url, **{"data.cache_dir": str(small_disk / "cache")})
    run = bench.start("pretrain", path)
    assert run.wait() == [2, 2]
    assert f"no space left in {small_disk}/cache/shards: lower data.cache_limit_gb, or give another data" in run.said()
    assert "Traceback" not in run.said()


@pytest.mark.promise("kill -9 while shards are downloaded: resumed, losses and weights equal those of local files")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_while_fetching(victim: int, bench: Bench, served: Served, local: Any) -> None:
    served.bytes_per_s = 40_000
    path = remote_recipe(bench, served.url)
    run = bench.start("pretrain", path)
    run.until(lambda: any((bench.folder / "cache" / "shards").glob("*.tar.part")))
    os.kill(run.pids[victim], signal.SIGKILL)
    assert -9 in run.end_with_the_first()
    bench.count("kills", 1)
    served.bytes_per_s = 0
    bench.start("pretrain", path, "--resume", "auto").ends_well()
    assert left(bench.folder / "run") == local


@pytest.mark.promise("If a shard changes on its server, every process stops and names it")
@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_shard_that_is_another_one_later(what: str, bench: Bench, served: Served) -> None:
    path = remote_recipe(bench, served.url, cache_shards=4.1, checkpoint_every_steps=1)
    run = bench.start("pretrain", path)
    run.until(lambda: steps_logged(bench.folder / "run") >= 3)
    for shard in served.folder.glob("*.tar"):
        if what == "gone":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:-1024] + bytes(2048))
    assert run.wait() == [2, 2], run.said()
    said = "404" if what == "gone" else "changed since it was indexed; start again"
    assert said in run.said()
    assert f"{served.url}/s" in run.said()
    assert "Traceback" not in run.said()
    assert said in status(bench.folder / "run")["why"]


@pytest.mark.promise("If a server is away for a while, the run waits and ends as with local files")
def test_a_server_that_is_gone_for_a_while(bench: Bench, served: Served, local: Any) -> None:
    path = remote_recipe(bench, served.url, cache_shards=4.1)
    run = bench.start("pretrain", path)
    run.until(lambda: steps_logged(bench.folder / "run") >= 3)
    served.faults += [{"status": 502}] * 1000
    time.sleep(1.5)
    served.faults.clear()
    run.ends_well()
    assert left(bench.folder / "run") == local


@pytest.mark.promise("Shards in an S3 bucket (moto's server) give the losses of local files, with one copy a machine")
@pytest.mark.parametrize("indexes", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_bucket(indexes: bool, bench: Bench, many: Path, served: Served, bucket: str, local: Any) -> None:
    import boto3

    aws = {
        "AWS_ENDPOINT_URL": bucket,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
    }
    client = boto3.client("s3", "us-east-1", endpoint_url=bucket, aws_access_key_id="k", aws_secret_access_key="s")
    name = f"b{indexes}".lower()
    client.create_bucket(Bucket=name)
    for file in many.iterdir():
        if indexes or file.suffix == ".tar":
            client.upload_file(str(file), name, f"x/{file.name}")
    path = remote_recipe(bench, f"s3://{name}/x", cache_shards=4.1)
    bench.start("pretrain", path, env=aws).ends_well()
    assert left(bench.folder / "run") == local
    lost = remote_recipe(bench, f"s3://{name}/none")
    run = bench.start("pretrain", lost, world=1, env=aws)
    assert run.wait() == [2]
    assert "none/s0.tar" in run.said()
    assert "Traceback" not in run.said()
