"""Measure how the cost of ours grows with images, patches, depth and processes."""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import ours
import whole
from sizes import SIZES

from mpp.data.order import MicroBatches, Order
from mpp.data.shards.index import index_shard
from mpp.data.shards.reader import ShardImages

IMAGES = tuple(10**n for n in range(3, 10))
IMAGES_PER_SHARD = 10_000
GLOBAL_BATCH = 4096
INDEXED = (10_000, 100_000, 1_000_000)
REPEATS = 5
TURN_S = 1.0
WHOLE_STEPS = 12
BLOCK = 512
"""Size of a block of a tar file, in bytes."""


def _median_s(do: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def order(images: int) -> dict[str, float]:
    """Return seconds to the first batch, and to the first after resuming in the last of ten epochs, and MiB held."""
    counts = [IMAGES_PER_SHARD] * (images // IMAGES_PER_SHARD) or [images]
    batch = min(GLOBAL_BATCH, images)

    def first(seen: int) -> list[tuple[int, int, int]]:
        made = Order(counts, global_batch=batch, seed=0)
        return next(iter(MicroBatches(made, seen=seen // batch * batch, steps=1, accumulate=1)))

    tracemalloc.start()
    made = Order(counts, global_batch=batch, seed=0)
    made.at(0, 0, batch)
    held = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    resume = _median_s(lambda: first(9 * images + images // 2))
    return {"first_batch_s": _median_s(lambda: first(0)), "resume_s": resume, "held_mib": held}


def write_tar(path: Path, images: int) -> None:
    """Write a tar of this number of members of one block each, as a tar program does."""
    header = np.zeros((images, BLOCK), np.uint8)
    names = np.array([f"{i:09d}.jpg" for i in range(images)], dtype="S16").view(np.uint8).reshape(images, 16)
    header[:, :16] = names
    for start, text in ((100, b"0000644\0"), (108, b"0000000\0"), (116, b"0000000\0"), (124, b"00000000010\0"),
                        (136, b"00000000000\0"), (148, b"        "), (156, b"0"), (257, b"ustar\x0000")):  # fmt: skip
        header[:, start : start + len(text)] = np.frombuffer(text, np.uint8)
    checksums = header.sum(1, dtype=np.int64)
    header[:, 148:156] = np.array([f"{c:06o}\0 ".encode() for c in checksums], dtype="S8").view(np.uint8).reshape(-1, 8)
    members = np.zeros((images, 2, BLOCK), np.uint8)
    members[:, 0] = header
    members[:, 1, :8] = 1
    with open(path, "wb") as file:
        file.write(members.tobytes())
        file.write(bytes(2 * BLOCK))


def index(images: int) -> dict[str, float]:
    """Return seconds to index one shard of this number of images, and to open it once it has an index."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.tar"
        write_tar(shard, images)
        began = time.perf_counter()
        found = index_shard(str(shard), folder)
        scanned = time.perf_counter() - began
        assert len(found.table) == images
        return {"index_s": scanned, "open_s": _median_s(lambda: ShardImages(str(shard), key="data.shards"))}


def step(image_px: int, depth: int) -> dict[str, float]:
    """Return images/s and GFLOP per image of `32px` with another size or depth."""
    plain = SIZES["32px"]
    name = f"{image_px} px, {depth} blocks"
    batch = max(plain.batch * plain.image_px**2 // image_px**2, 2)
    SIZES[name] = plain._replace(image_px=image_px, depth=depth, batch=batch)
    contestant = ours.STEP["mpp late, 1 block, a third"](name, "small", "fp32")
    contestant.run(1)
    rates = []
    for _ in range(REPEATS):
        began, images = time.perf_counter(), 0
        while time.perf_counter() - began < TURN_S:
            images += contestant.run(1)
        rates.append(images / (time.perf_counter() - began))
    return {"images_per_s": statistics.median(rates), "gflop_per_image": contestant.facts["gflop_per_image"]}


def processes(count: int, pictures: Path) -> dict[str, float]:
    """Return images/s of a whole command on `32px` under torchrun, with this number of processes."""
    size = SIZES["32px"]
    command = whole.ours(
        str(pictures / "32px"), 0, processes=count, **{
            "data.image_size": 32, "encoder.name": "vit_tiny_patch16_224",
            "encoder.args": f"{{patch_size: 4, embed_dim: {size.dim}, depth: {size.depth}, num_heads: {size.heads}}}",
            "corruption": "token", "corruption.enter": size.depth - 1, "head": "linear",
            "optim.global_batch_size": size.batch,
        },
    )  # fmt: skip
    runs = [whole.run(command, steps=WHOLE_STEPS, batch=size.batch, out=pictures / "run") for _ in range(3)]
    return {"images_per_s": statistics.median(run.images_per_s for run in runs)}


def figures(pictures: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yield (run, what, metric, value)."""
    for images in IMAGES:
        yield from (("bench-growth-order", f"{images:.0e} images", k, v) for k, v in order(images).items())
    for images in INDEXED:
        yield from (("bench-growth-index", f"{images:.0e} images", k, v) for k, v in index(images).items())
    for image_px in (16, 32, 64, 96):
        yield from (
            ("bench-growth-patches", f"{(image_px // 4) ** 2} patches", k, v) for k, v in step(image_px, 12).items()
        )
    for count in (1, 2):
        what = "1 process, 2 threads" if count == 1 else f"{count} processes, 1 thread each"  # as torchrun sets it
        yield from (("bench-growth-processes", what, k, v) for k, v in processes(count, pictures).items())
    for depth in (3, 6, 12, 24):
        yield from (("bench-growth-depth", f"{depth} blocks", k, v) for k, v in step(32, depth).items())
