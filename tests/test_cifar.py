"""The main job on real images in a minute: CIFAR-10 from ../shared/data."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import mpp
from mpp.data.shards.pack import pack
from mpp.runs.records import read_metrics
from tests.conftest import ROOT

ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10-images.tar.gz"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not there"),
]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the first 3,000 training and 500 test images as shards."""
    folder = tmp_path_factory.mktemp("cifar")
    left = {"train": {}, "test": {}}  # type: dict[str, dict[str, int]]
    each = {"train": 300, "test": 50}
    with tarfile.open(ARCHIVE) as tar:
        for member in tar:
            parts = member.name.strip("./").split("/")
            if not member.isfile() or len(parts) != 3 or left[parts[0]].get(parts[1], 0) >= each[parts[0]]:
                continue
            left[parts[0]][parts[1]] = left[parts[0]].get(parts[1], 0) + 1
            target = folder / "images" / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    for part in ("train", "test"):
        packed = pack(str(folder / "images" / part), str(folder / part), workers=2)
        assert packed.images == 10 * each[part]
        assert len(packed.classes) == 10
    return folder


def test_pretrain_finetune_export_on_real_images(cifar: Path, tmp_path: Path) -> None:
    small = {
        "out": str(tmp_path / "pretrain"),
        "data.shards": str(cifar / "train"),
        "encoder.args": {"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2},
        "corruption.enter": 2,
        "optim.steps": 200,
        "optim.warmup_steps": 20,
    }
    result = mpp.pretrain(ROOT / "recipes" / "pretrain" / "cifar10.yaml", **small)
    assert result.skill > 0.15, "expected better than each patch's mean, on images that were not trained on"
    assert read_metrics(result.out)[-1]["skipped_images"] == 0
    tuned = mpp.finetune(
        ROOT / "recipes" / "finetune" / "cifar10.yaml",
        **{
            "out": str(tmp_path / "finetune"),
            "encoder": str(result.out),
            "data.train": str(cifar / "train"),
            "data.val": str(cifar / "test"),
            "data.labels_per_class": 50,
            "seeds": [0],
            "beside": [],
            "optim.steps": 120,
            "optim.warmup_steps": 10,
        },
    )
    assert tuned.score["pretrained"].mean > 0.2, "expected twice chance"
    assert mpp.export(result.out, tmp_path / "encoder").difference <= 1e-5
    assert json.loads((tmp_path / "finetune" / "result.json").read_text())["val_images"] == 500
