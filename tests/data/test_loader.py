"""Batches: a sample depends only on its position, and bad images are replaced and named."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpp.data.batch import Batch
from mpp.data.crop import Crop
from mpp.data.loader import batches
from mpp.data.order import MicroBatches, Order
from mpp.data.shards.reader import REPLACEMENTS, ShardImages, held_out_rows
from mpp.errors import UserError
from mpp.objective.masks.uniform import UniformMask
from mpp.pretraining.dataset import PretrainDataset
from tests.conftest import drawn_image, encoded

CROP = Crop((16, 12), 3, (0.3, 1.0), (0.75, 4 / 3), 0.5, ("JPEG", "PNG"), 10**6)


def dataset_of(shards: Path, seed: int = 0, held_out: int = 0, ratio: Any = 0.5) -> PretrainDataset:
    images = ShardImages(str(shards), key="data.shards")
    counts = [n - held_out for n in images.counts]
    return PretrainDataset(images, CROP, UniformMask(ratio=ratio), (4, 3), seed, counts, 12)


def by_position(
    dataset: PretrainDataset, world: int, workers: int, steps: int = 4
) -> dict[int, tuple[torch.Tensor, ...]]:
    order = Order(dataset.images.counts, global_batch=12, seed=dataset.seed)
    found = {}
    for rank in range(world):
        sampler = MicroBatches(order, seen=0, steps=steps, accumulate=1, rank=rank, world=world)
        for b in batches(dataset, sampler, workers=workers, pin_memory=False):
            for i, position in enumerate(b.positions.tolist()):
                found[position] = (b.images[i], b.units.hidden[i], b.units.noise[i], b.samples[i])
    return found


def test_the_same_whatever_the_processes_and_workers(shards: Path) -> None:
    dataset = dataset_of(shards)
    one = by_position(dataset, 1, 0)
    assert sorted(one) == list(range(48))
    for world, workers in ((2, 0), (3, 2), (1, 1)):
        other = by_position(dataset, world, workers)
        assert other.keys() == one.keys()
        for position, parts in one.items():
            assert all(torch.equal(a, b) for a, b in zip(parts, other[position], strict=True))


def test_a_range_of_ratios_is_drawn_once_for_all_processes_of_a_step(shards: Path) -> None:
    dataset = dataset_of(shards, ratio=(0.2, 0.9))
    one, other = by_position(dataset, 1, 0, steps=8), by_position(dataset, 3, 2, steps=8)
    hidden = [int(one[p][1].sum()) for p in range(96)]
    steps = [hidden[i : i + 12] for i in range(0, 96, 12)]
    assert all(len(set(counts)) == 1 for counts in steps), "all samples of a step must have the same count"
    assert len({counts[0] for counts in steps}) > 3
    assert all(2 <= counts[0] <= 11 for counts in steps)
    assert all(torch.equal(one[p][1], other[p][1]) for p in one)
    assert dataset.batch([(p, 0, 5) for p in (3, 40)], centre=True).units.count == round(12 * 0.55)


def test_positions_and_seeds_differ(shards: Path) -> None:
    key = (0, 5)
    a = dataset_of(shards).batch([(p, *key) for p in range(8)])
    b = dataset_of(shards, seed=1).batch([(p, *key) for p in range(8)])
    for batch in (a, b):
        assert len({i.numpy().tobytes() for i in batch.images}) == 8, "one image, eight crops"
        assert len({m.numpy().tobytes() for m in batch.units.hidden}) > 4
        assert batch.units.count == 6
    assert not torch.equal(a.images, b.images)
    assert not torch.equal(a.units.hidden, b.units.hidden)


def test_centre_crops_draw_nothing(shards: Path) -> None:
    a, b = (dataset_of(shards).batch([(p, 0, 5)], centre=True) for p in (0, 1))
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.units.hidden, b.units.hidden)


def shard_of(path: Path, images: list[bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, data in enumerate(images):
            info = tarfile.TarInfo(f"image-{i}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_bad_images_are_replaced_by_their_neighbours_and_named(tmp_path: Path) -> None:
    good = [encoded(drawn_image(i), "JPEG") for i in range(3)]
    path = shard_of(tmp_path / "a.tar", [good[0], b"<html>", good[1][:200], good[2]])
    batch = dataset_of(path).batch([(p, 0, p) for p in range(4)], centre=True)
    assert torch.equal(batch.images[1], batch.images[3])
    assert torch.equal(batch.images[2], batch.images[3])
    assert batch.replaced == 2
    assert len(batch.bad) == 3  # image-2 is also skipped on the way from image-1
    assert "a.tar: image-1.jpg: not an image" in batch.bad[0]


def test_views_of_a_bad_image_count_once(tmp_path: Path) -> None:
    good = [encoded(drawn_image(i), "JPEG") for i in range(2)]
    path = shard_of(tmp_path / "a.tar", [good[0], b"<html>", good[1]])
    batch = dataset_of(path).batch([(position, 0, position // 2) for position in range(6)])
    assert batch.replaced == len(batch.bad) == 1
    assert not torch.equal(batch.images[2], batch.images[3]), "views of the neighbour differ, too"


def test_a_held_out_image_never_takes_a_training_images_place(tmp_path: Path) -> None:
    good = [encoded(drawn_image(i), "JPEG") for i in range(10)]
    good[7] = good[9] = b"bad"
    dataset = dataset_of(shard_of(tmp_path / "a.tar", good), held_out=2)  # rows 8 and 9
    batch = dataset.batch([(0, 0, 7), (0, 0, 0), (0, 0, 9), (0, 0, 8)], centre=True)
    assert torch.equal(batch.images[0], batch.images[1])
    assert torch.equal(batch.images[2], batch.images[3])


def test_a_shard_of_bad_images_still_gives_full_batches(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", [b"nothing"] * 5)
    batch = dataset_of(path).batch([(0, 0, 0), (1, 0, 3)])
    assert batch.images.shape == (2, 3, 16, 12)
    assert (batch.images == 128).all()
    assert len(batch.bad) == 10


def test_so_many_bad_images_in_a_row_are_passed_over_and_no_more(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", [b"nothing"] * REPLACEMENTS + [encoded(drawn_image(0), "JPEG")] * 2)
    grey, found = dataset_of(path).batch([(0, 0, 0), (1, 0, 1)]).images
    assert (grey == 128).all()
    assert (found != 128).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changed_stops_with_one_line(tmp_path: Path, workers: int) -> None:
    path = shard_of(tmp_path / "a.tar", [encoded(drawn_image(i), "JPEG") for i in range(4)])
    dataset = dataset_of(path)
    shard_of(path, [encoded(drawn_image(i), "JPEG") for i in range(5)])
    sampler = MicroBatches(Order([4], global_batch=2, seed=0), seen=0, steps=2, accumulate=1)
    with pytest.raises(UserError, match=r"a\.tar: changed since it was indexed") as error:
        list(batches(dataset, sampler, workers=workers, pin_memory=False))
    assert "\n" not in str(error.value)


class _Dies(PretrainDataset):
    def __getitems__(self, keys: list[tuple[int, int, int]]) -> Batch:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_stops_with_one_line(shards: Path) -> None:
    dataset = _Dies(ShardImages(str(shards), key="k"), CROP, UniformMask(), (4, 3), 0, [25, 25, 10], 12)
    with pytest.raises(UserError, match=r"data\.workers: DataLoader worker .*pid") as error:
        list(batches(dataset, [[(0, 0, 0)]], workers=1, pin_memory=False))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_worker_that_dies_while_it_hands_over_a_batch(
    error: Exception, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether this error or torch's report of it comes first depends on chance."""

    class Breaks(torch.utils.data.DataLoader):
        def __iter__(self) -> Iterator[Any]:
            raise error

    monkeypatch.setattr("mpp.data.loader.DataLoader", Breaks)
    dataset = PretrainDataset(ShardImages(str(shards), key="k"), CROP, UniformMask(), (4, 3), 0, [25, 25, 10], 12)
    with pytest.raises(
        UserError, match=r"data\.workers: .*(EOFError|Connection reset.*); out of memory\? Continue with --resume auto"
    ):
        list(batches(dataset, [[(0, 0, 0)]], workers=1, pin_memory=False))
    with pytest.raises(type(error)):
        list(batches(dataset, [[(0, 0, 0)]], workers=0, pin_memory=False))


def test_an_error_beside_living_workers_ends_the_process() -> None:
    """Workers ignore the signal with which multiprocessing ends them, so the process could wait for them forever."""
    code = (
        "import torch\n"
        "from mpp.data.loader import batches\n"
        "class Numbers(torch.utils.data.Dataset):\n"
        "    def __getitems__(self, keys): return keys\n"
        "for _ in batches(Numbers(), [[0]] * 1000, workers=1, pin_memory=False):\n"
        "    held = _\n"
        "    raise ValueError('on purpose')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("ValueError: on purpose")


class _Shows(torch.utils.data.Dataset[Any]):
    """Passes errors to sys.excepthook, as multiprocessing does with errors of its threads."""

    def __getitems__(self, keys: list[int]) -> list[int]:
        for error in (ConnectionResetError("the parent is gone"), EOFError("so it is"), ValueError("on purpose")):
            sys.excepthook(type(error), error, None)
        return keys


def test_a_worker_says_nothing_of_a_parent_that_is_gone(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(batches(_Shows(), [[3]], workers=1, pin_memory=False)) == [[3]]  # type: ignore[list-item]
    assert capfd.readouterr().err == "ValueError: on purpose\n"


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.shards: no images in"):
        ShardImages(str(shard_of(tmp_path / "a.tar", [])), key="data.shards")


def test_held_out_rows_are_spread_over_the_shards() -> None:
    assert held_out_rows([100, 100, 50], 25).tolist() == [10, 10, 5]
    assert held_out_rows([10, 0, 3], 3).sum() == 3
    assert (held_out_rows([1, 1, 1, 1], 2) <= 1).all()
    with pytest.raises(UserError, match=r"data\.held_out is 8, but there are only 10"):
        held_out_rows([10], 8)
