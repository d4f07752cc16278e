"""The probe in training changes nothing and detects what features contain. A run without progress prints a warning."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpp
from mpp.data.labeled import open_labeled
from mpp.encoders.creation import create_timm_model
from mpp.errors import UserError
from mpp.pretraining import monitor
from mpp.pretraining.monitor import OnlineProbe, ProbeImages, probe_images
from mpp.runs.history import read_run
from mpp.runs.records import read_metrics
from mpp.runs.symptoms import symptoms
from tests.conftest import command, pretrain_recipe, pretrain_values


def probe_keys(shards: Path, **changes: Any) -> dict[str, Any]:
    return {
        "probe": {
            "train": [str(shards / f"shard-{i:06d}.tar") for i in (1, 2)], "val": str(shards / "shard-000000.tar"),
            "every_steps": 5, **changes,
        }
    }  # fmt: skip


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("images_per_s", "data_wait", "probe_seconds", "cpu_minutes")
    return [{k: v for k, v in r.items() if k not in times} for r in records]


RESNET = {"encoder": {"name": "resnet10t"}, "corruption": "zeros", "mask.unit_px": 32, "data.image_size": 64}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"encoder.args.drop_path_rate": 0.2}, (1, 2)),  # draws random numbers in training mode
        ({**RESNET, "optim.global_batch_size": 4}, (1, 2, 3, 4, 5)),  # skill reads the statistics of its batch norms
    ],
    ids=["drop path", "batch norms"],
)
def test_it_changes_nothing_in_training(
    changes: dict[str, Any], layers: tuple[int, ...], shards: Path, tmp_path: Path
) -> None:
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "with", **probe_keys(shards), **changes))
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "without", **changes))
    watched, alone = (without_times(read_metrics(tmp_path / name)) for name in ("with", "without"))
    stripped = [{k: v for k, v in r.items() if not k.startswith("probe_")} for r in watched]
    assert stripped == alone
    probed = [r for r in watched if "probe_accuracy" in r]
    assert [r["step"] for r in probed] == [5, 10, 15, 20], "each measurement must be in one line"
    assert all(0.3 <= r["probe_accuracy"] <= 1 and r["probe_layer"] in layers for r in probed)


def test_resumed_it_knows_what_it_had_seen(shards: Path, tmp_path: Path) -> None:
    given = {**probe_keys(shards, every_steps=10), "skill_every_steps": 2}
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "whole", **given))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000020")
    shutil.rmtree(tmp_path / "cut" / "encoder")
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "cut", **given), resume="auto")
    whole, cut = (without_times(read_metrics(tmp_path / name)) for name in ("whole", "cut"))
    assert whole == cut
    from mpp.runs.checkpoint import newest, read_state

    states = [read_state(newest(tmp_path / name / "checkpoints")) for name in ("whole", "cut")]  # type: ignore[arg-type]
    assert len(states[0]["history"]) == 10
    assert states[0]["history"] == states[1]["history"]
    changed = {**probe_keys(shards, every_steps=3), "skill_every_steps": 2}
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "whole", **changed), resume="auto")  # the probe's keys may change


def test_resumed_without_it_nothing_old_is_written(shards: Path, tmp_path: Path) -> None:
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **probe_keys(shards, every_steps=10)))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    shutil.rmtree(tmp_path / "run" / "encoder")
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run"), resume="auto")
    lines = read_metrics(tmp_path / "run")
    assert [m["step"] for m in lines if "probe_accuracy" in m] == [10]


@pytest.mark.slow
def test_two_processes(shards: Path, tmp_path: Path) -> None:
    import yaml

    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(pretrain_values(shards, tmp_path / "run", **probe_keys(shards))))
    assert command("pretrain", recipe, "out=" + str(tmp_path / "one")).returncode == 0
    done = command("pretrain", recipe, "out=" + str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name)[-1] for name in ("one", "two"))
    assert two["probe_accuracy"] == pytest.approx(one["probe_accuracy"], abs=0.09), "may differ by two images"


def test_it_sees_what_is_there() -> None:
    """The mean of every layer contains the brightness, but no layer contains random labels."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    args = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = create_timm_model("vit_tiny_patch16_224", image_size=(8, 8), in_chans=3, pretrained=False, args=args)
    bright = torch.arange(200) % 2
    images = (torch.randint(0, 128, (200, 3, 8, 8), generator=rng) + 100 * bright.view(-1, 1, 1, 1)).to(torch.uint8)
    noise = torch.randint(0, 2, (200,), generator=rng)
    half = torch.tensor(0.5).view(1, 1, 1).expand(3, 1, 1)

    def accuracy(labels: torch.Tensor) -> float:
        sides = [ProbeImages(images[s], labels[s].numpy()) for s in (slice(0, 100), slice(100, 200))]
        return OnlineProbe(*sides, 2, 0.01, half, half)(model.eval(), torch.device("cpu")).accuracy  # type: ignore[arg-type]

    assert accuracy(bright) == 1.0
    assert 0.3 < accuracy(noise) < 0.7
    assert all(p.requires_grad for p in model.parameters()), "the probe must not freeze parameters"


def test_no_more_images_than_asked(shards: Path) -> None:
    data = open_labeled((str(shards),), key="k", classes=None, cache_dir=None, cache_limit_bytes=1e9)
    reading: Any = {"channels": 3, "formats": ("JPEG", "PNG"), "max_image_pixels": 10**6}
    few = probe_images(data, (16, 16), 7, 0, "k", **reading)
    assert few.images.shape == (7, 3, 16, 16)
    assert np.array_equal(few.labels, probe_images(data, (16, 16), 7, 0, "k", **reading).labels)
    with pytest.raises(UserError, match="k: not one image can be read"):
        probe_images(data, (16, 16), 7, 0, "k", **{**reading, "max_image_pixels": 1})


def test_a_run_that_stands_still_says_so_once(shards: Path, tmp_path: Path) -> None:
    given = {"optim.base_lr": 1e-9, "skill_every_steps": 1}
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **given))
    said = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "has risen" in line]
    assert len(said) == 1
    assert "warning: neither skill nor probe has risen since step" in said[0]
    assert math.isfinite(read_metrics(tmp_path / "run")[-1]["skill"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": "nowhere"}, "probe.val: .*nowhere"),
        ({"every_steps": 0}, "probe.every_steps: must be >= 1; got 0"),
        ({"train": "unlabeled"}, "no label beside it"),
    ],
)
def test_wrong_inputs(changes: dict[str, Any], message: str, shards: Path, image_folder: Path, tmp_path: Path) -> None:
    if changes.get("train") == "unlabeled":
        from mpp.data.shards.pack import pack

        pack(str(image_folder), str(tmp_path / "unlabeled"), labels=False, workers=1)
        changes = {"train": str(tmp_path / "unlabeled")}
    with pytest.raises(UserError, match=message):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **probe_keys(shards, **changes)))
    assert not (tmp_path / "run").exists()


class Fixed(torch.nn.Module):
    """A model that returns the given features."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features

    def forward_intermediates(self, images: torch.Tensor, **asked: Any) -> list[torch.Tensor]:
        assert asked == {"indices": 1, "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
        return [self.features[:, :, None, None].expand(-1, -1, 2, 2)]


def test_the_spread_is_that_of_what_images_do_not_share() -> None:
    four = torch.cat([torch.eye(4), -torch.eye(4)])  # four directions of equal length
    images = torch.zeros(8, 3, 4, 4)
    found = monitor.spread(Fixed(four), images)
    assert found == pytest.approx((4.0, 1.0))
    common = monitor.spread(Fixed(four + torch.tensor([0.0, 0.0, 0.0, 2.0])), images)
    assert common == pytest.approx((4.0, 1 / 5)), "the common part has 4 of an energy of 5"
    assert monitor.spread(Fixed(torch.ones(8, 4)), images).share == pytest.approx(0)
    assert monitor.spread(Fixed(torch.arange(8.0)[:, None] * torch.ones(8, 4)), images).rank == pytest.approx(1)


@pytest.mark.parametrize(("images", "margin"), [(25, 0.2), (100, 0.1), (100_000, 0.02)])
def test_a_loss_within_two_standard_errors_is_noise(images: int, margin: float) -> None:
    side = ProbeImages(torch.zeros(1, 3, 4, 4), np.zeros(images, dtype=np.int64))
    probe = OnlineProbe(side, side, 2, 0.01, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    assert probe.margin(0.5) == pytest.approx(margin)


def test_weights_that_get_worse_than_they_were_are_reported(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe of the first weights is measured once. It is kept when a run resumes."""
    monkeypatch.setattr(OnlineProbe, "margin", lambda self, accuracy: 0.02)  # the probe has only 25 images
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "first", **probe_keys(shards), **{"optim.steps": 40}))
    begins = {"encoder": {"name": str(tmp_path / "first")}, **probe_keys(shards, every_steps=5)}
    kept = pretrain_recipe(shards, tmp_path / "kept", **begins, **{"optim.base_lr": 1e-9})
    mpp.pretrain(kept)
    destroyed = pretrain_recipe(shards, tmp_path / "destroyed", **begins, **{"optim.base_lr": 100.0})
    mpp.pretrain(destroyed)
    at_start = {name: read_metrics(tmp_path / name)[-1]["probe_at_start"] for name in ("kept", "destroyed")}
    assert at_start["kept"] == at_start["destroyed"]
    assert read_metrics(tmp_path / "kept")[-1]["probe_accuracy"] == at_start["kept"]
    warning = "points below that of the weights that training started from. Try a lower"
    for name, worse in (("kept", False), ("destroyed", True)):
        said = (tmp_path / name / "train.log").read_text()
        assert said.count("probe of the weights that training starts from") == 1
        assert (warning in said) == worse
        assert ("worse" in [symptom.kind for symptom in symptoms(read_run(tmp_path / name))]) == worse
    branch = tmp_path / "branch"
    mpp.pretrain(destroyed, out=str(branch), resume=str(tmp_path / "destroyed" / "checkpoints" / "step-00000015"))
    assert read_metrics(branch)[-1]["probe_at_start"] == at_start["destroyed"]
    assert "probe of the weights that training starts from" not in (branch / "train.log").read_text()
    assert "probe_at_start" not in read_metrics(tmp_path / "first")[-1]
    other = {**begins, **probe_keys(shards, every_steps=5, images=9), "optim.base_lr": 100.0}
    from_step = str(tmp_path / "destroyed" / "checkpoints" / "step-00000015")
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "other", **other), resume=from_step)
    assert "probe_at_start" not in read_metrics(tmp_path / "other")[-1], "another probe has another start"
