"""Crops resized where the model runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mpp
from mpp.data.cuts import AT_ONCE, LONGEST, finished, packed, resized
from mpp.data.decode import Cut, resize
from mpp.data.images import ShardImages
from mpp.data.loader import Crop, PretrainDataset
from mpp.masks.uniform import UniformMask
from mpp.records import read_metrics
from mpp.replaying import replay
from mpp.types import Batch
from tests.conftest import drawn_image, encoded, pretrain_recipe
from tests.data.test_loader import shard_of
from tests.test_nonfinite import DIVERGES

DEVICES = [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
]  # fmt: skip
SIDES = st.integers(1, 40)


def cut_out(height: int, width: int, channels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES, st.booleans()), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 24), st.integers(2, 24)),
    channels=st.sampled_from([1, 3, 4]),
)
def test_each_as_torch_resizes_it_alone(
    sizes: list[tuple[int, int, bool]], size: tuple[int, int], channels: int
) -> None:
    """In float; where a value lies between two numbers it may be rounded to either.

    Not to one column: torch 2.15 then gives every row the value of the first.
    """
    cuts = [cut_out(h, w, channels, i) for i, (h, w, _) in enumerate(sizes)]
    found = resized(*packed([Cut.whole(c) for c in cuts], [f for *_, f in sizes]), size)
    assert found.dtype == torch.uint8
    for cut, (*_, flip), image in zip(cuts, sizes, found, strict=True):
        alone = F.interpolate(cut[None].float(), size, mode="bicubic", antialias=True)[0].clamp(0, 255)
        alone = alone.flip(-1) if flip else alone
        assert (image.float() - alone).abs().max() <= 0.501


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_that_begins_within_a_pixel(flip: bool) -> None:
    """As Pillow resizes it, which takes fractions, too."""
    smooth = F.interpolate(cut_out(6, 7, 3, 0)[None].float(), (31, 37), mode="bicubic").clamp(0, 255).to(torch.uint8)
    cut = Cut(smooth[0], (0.4, 0.7, 30.1, 35.9))
    (found,) = resized(*packed([cut], [flip]), (12, 10))
    alone = resize(cut, (12, 10))
    whole = resize(Cut.whole(cut.pixels), (12, 10))
    assert ((found.flip(-1) if flip else found).int() - alone.int()).abs().max() <= 1
    assert (whole.int() - alone.int()).abs().float().mean() > 2, "it makes a difference"


@pytest.mark.parametrize("device", DEVICES)
def test_more_than_are_resized_at_once(device: str) -> None:
    cuts = [Cut.whole(cut_out(3 + i % 7, 5 + i % 5, 3, i)) for i in range(AT_ONCE + 3)]
    flips = [i % 2 == 0 for i in range(len(cuts))]
    pixels, table = packed(cuts, flips)
    together = resized(
        pixels.to(device), table._replace(table=table.table.to(device), boxes=table.boxes.to(device)), (6, 4)
    ).cpu()
    alone = torch.cat([resized(*packed([c], [f]), (6, 4)) for c, f in zip(cuts, flips, strict=True)])
    assert together.shape == (AT_ONCE + 3, 3, 6, 4)
    assert (together.int() - alone.int()).abs().max() <= 1


def test_the_same_crops_as_the_loader_makes(tmp_path: Path) -> None:
    """Which rounds rows before it resizes columns; large ones, which decoders do not shrink, it resizes itself."""
    pictures = [encoded(drawn_image(i, 64), "PNG" if i % 3 else "JPEG") for i in range(11)]
    images = ShardImages(str(shard_of(tmp_path / "s.tar", [*pictures, b"no image"])), key="data.shards")
    keys = [(40 + i, 0, i) for i in range(12)]

    def batch(on_device: bool) -> Batch:
        crop = Crop((16, 12), 3, (0.3, 1.0), (0.75, 4 / 3), 0.5, ("JPEG", "PNG"), 10**6, on_device)
        dataset = PretrainDataset(images, crop, UniformMask(ratio=0.6), (4, 3), 0, images.counts, 4)
        return dataset.batch(keys)

    host, other = batch(False), batch(True)
    assert other.cuts is not None
    areas = other.cuts.table[:, 0] * other.cuts.table[:, 1]
    assert len(other.images) == areas.sum()
    assert (other.cuts.table[:, :2] <= LONGEST * torch.tensor([16, 12])).all()
    assert len({tuple(row) for row in other.cuts.table.tolist()}) > 5
    assert (areas == 16 * 12).any(), "a large PNG"
    finished(other, (16, 12))
    assert other.cuts is None
    assert (host.images.int() - other.images.int()).abs().max() <= 3
    assert (host.images.float() - other.images.float()).abs().mean() < 0.5
    assert torch.equal(host.mask, other.mask)
    assert torch.equal(host.noise, other.noise)
    assert (host.bad, host.replaced, host.positions.tolist()) == (other.bad, other.replaced, other.positions.tolist())


@pytest.mark.slow
def test_a_run_of_them(shards: Path, tmp_path: Path) -> None:
    """Near the run that resizes in the loader; resumed to the last bit."""
    recipe = pretrain_recipe(shards, tmp_path / "a", **{"data.resize_on": "device", "data.workers": 1})
    mpp.pretrain(recipe)
    host = mpp.pretrain(pretrain_recipe(shards, tmp_path / "host"))
    losses, near = ([m["loss"] for m in read_metrics(out)] for out in (tmp_path / "a", host.out))
    np.testing.assert_allclose(losses, near, rtol=0.01)
    assert losses != near
    branch = mpp.pretrain(recipe, out=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoints" / "step-00000015"))
    assert [m["loss"] for m in read_metrics(branch.out)] == losses[15:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mpp.errors.MppWarning")
def test_a_step_that_is_left_out_is_kept_with_what_the_model_saw(shards: Path, tmp_path: Path) -> None:
    changes = {"data.resize_on": "device", "optim.steps": 6, "optim.max_batch_per_device": 8}
    out = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **DIVERGES, **changes)).out
    assert replay(out).same
