"""Detection: losses and boxes of every detector on every kind of encoder, the metric, then whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mpp
from mpp.encoders.maps import FeatureMaps
from mpp.errors import MppWarning, UserError
from mpp.finetuning.model import load_dense
from mpp.finetuning.open_labels import open_label_kind
from mpp.finetuning.tasks.detect import DetectTask
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from mpp.runs.records import read_metrics
from tests.conftest import command
from tests.finetuning.tasks import test_segment
from tests.finetuning.tasks.test_segment import CONVNEXT

PLAIN, STAGES = FeatureMaps((8, 8), (8, 8)), FeatureMaps((8, 12, 16), (4, 8, 16))
DETECTORS = ["fcos", "retinanet", "faster_rcnn"]


def maps_of(kind: FeatureMaps, images: int = 2, side: int = 64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(images, d, side // s, side // s, generator=rng) for d, s in zip(*kind, strict=True)]


def target(boxes: list[list[float]], labels: list[int]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("maps", [PLAIN, STAGES], ids=["plain", "stages"])
def test_losses_and_boxes(maps: FeatureMaps, detector: Any) -> None:
    torch.manual_seed(0)
    task = DetectTask(maps, 2, detector=detector, width=32, finest=2, max_detections=7, score_threshold=0.0)
    targets = [target([[4, 4, 30, 40], [20, 8, 60, 30]], [0, 1]), target([], [])]
    loss = task.loss(task(maps_of(maps), (64, 64), targets), targets)
    loss.backward()
    assert loss.isfinite()
    assert loss.ndim == 0
    assert all(p.grad is not None for p in task.parameters()), "every parameter must get a gradient"
    found = task.eval()(maps_of(maps), (64, 64))
    for one in found:
        assert 0 < len(one["boxes"]) <= 7
        assert one["labels"].min() >= 0
        assert one["labels"].max() <= 1, "labels must be class numbers, without a background"
        assert one["boxes"].min() >= 0
        assert one["boxes"].max() <= 64
    assert task.detector.backbone.maps is None, "the maps must not be kept"


@pytest.mark.parametrize(
    ("detector", "lr", "steps"), [("fcos", 2e-3, 60), ("retinanet", 1e-3, 150), ("faster_rcnn", 2e-3, 30)]
)
def test_it_finds_what_it_was_shown(detector: Any, lr: float, steps: int) -> None:
    """Each detector learns two images by heart, from their feature maps."""
    torch.manual_seed(0)
    task = DetectTask(PLAIN, 2, detector=detector, width=32, finest=2)
    targets = [target([[8, 8, 32, 32]], [0]), target([[24, 20, 60, 44]], [1])]
    optimizer = torch.optim.AdamW(task.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(task(maps_of(PLAIN), (64, 64), targets), targets).backward()
        optimizer.step()
    whole = [
        {**t, "iscrowd": torch.zeros(1, dtype=torch.int64), "area": torch.tensor([900.0]), "scale": torch.tensor(1.0),
         "size": torch.tensor([64, 64])} for t in targets
    ]  # fmt: skip
    judged = task.eval().judge(lambda x: task(maps_of(PLAIN), (64, 64)), torch.zeros(2, 3, 64, 64), whole, (64, 64))
    assert task.metrics([judged])["map_50"] > 0.6


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    ("stride", "cells", "finest"),
    [(14, 16, 4), (16, 15, 4), (4, 8, 4), (8, 8, 2)],
    ids=["14 px", "odd", "4 px", "8 px"],
)
def test_anchors_stand_at_the_cells(detector: Any, stride: int, cells: int, finest: Any) -> None:
    """Anchors are centred on the cells of the feature maps, whatever the patch size."""
    task = DetectTask(FeatureMaps((8,), (stride,)), 2, detector=detector, width=32, finest=finest)
    side = stride * cells
    levels = task.pyramid([torch.zeros(1, 8, cells, cells)])
    generator = task.detector.rpn.anchor_generator if detector == "faster_rcnn" else task.detector.anchor_generator
    images, _ = task.detector.transform([torch.zeros(1, side, side)])
    (found,) = generator(images, levels)
    each = {"fcos": 1, "retinanet": 9, "faster_rcnn": 3}[detector]
    start = 0
    for level, s in zip(levels, task.pyramid.strides, strict=True):
        own = found[start : start + each * level.shape[-1] * level.shape[-2]].view(*level.shape[-2:], each, 4)
        start += own[..., 0].numel()
        centres = (own[..., :2] + own[..., 2:]) / 2
        expected = s * (torch.arange(level.shape[-1]) + 0.5)
        torch.testing.assert_close(centres[..., 0], expected.view(1, -1, 1).expand(own.shape[:3]))
        torch.testing.assert_close(centres[..., 1], expected.view(-1, 1, 1).expand(own.shape[:3]))
        smallest = {"fcos": s, "retinanet": 4 * s, "faster_rcnn": 8 * s}[detector]
        areas = (own[..., 2:] - own[..., :2]).prod(-1)
        assert float(areas.min()) == pytest.approx(smallest**2, rel=1e-4)
    assert start == len(found)
    if detector == "faster_rcnn":
        assert task.detector.roi_heads.box_roi_pool.scales == [1 / s for s in task.pyramid.strides]


def test_cells_below_a_pixel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"finest: 4 makes cells of 0\.5 px"):
        DetectTask(FeatureMaps((8,), (2,)), 2, width=32)


def true_of(boxes: list[list[float]], labels: list[int], scale: float = 1.0) -> dict[str, torch.Tensor]:
    found = target(boxes, labels)
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    return found | {
        "iscrowd": torch.zeros(len(labels), dtype=torch.int64), "area": sides.prod(1), "scale": torch.tensor(scale),
        "size": torch.tensor([100, 200]),
    }  # fmt: skip


def test_boxes_are_told_in_the_pixels_of_the_file() -> None:
    task = DetectTask(PLAIN, 2, width=32).eval()
    shown = {"boxes": torch.tensor([[10.0, 5, 20, 10], [90, 40, 120, 60]]), "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.8])}  # fmt: skip
    (found,) = task.predict(lambda x: [shown], torch.zeros(1, 3, 64, 64), [true_of([], [], 0.5)])
    assert found["boxes"].tolist() == [[20, 10, 40, 20], [180, 80, 200, 100]], "boxes must end at the edge of the image"
    beside = {k: torch.cat([v, v[:1]]) for k, v in shown.items()}
    beside["boxes"][2] = torch.tensor([10.0, 52, 20, 60])
    (found,) = task.predict(lambda x: [beside], torch.zeros(1, 3, 64, 64), [true_of([], [], 0.5)])
    assert len(found["boxes"]) == 2, "boxes on the grey area below the image must be dropped"


def test_metrics_by_hand() -> None:
    task = DetectTask(PLAIN, 3, width=32)
    first = true_of([[0, 0, 50, 50], [100, 0, 150, 50]], [0, 1])
    second = true_of([[0, 0, 20, 20]], [0])
    exact = [{k: t[k] for k in ("boxes", "labels")} | {"scores": torch.ones(len(t["labels"]))} for t in (first, second)]
    perfect = task.metrics([[(exact[0], first)], [(exact[1], second)]])
    assert perfect["map"] == perfect["map_50"] == perfect["mar_100"] == pytest.approx(1)
    assert "map_large" not in perfect, "a size without boxes must have no metric"
    assert task.per_class([[(exact[0], first), (exact[1], second)]]).isnan().tolist() == [False, False, True]
    wrong = {**exact[0], "labels": torch.tensor([1, 0])}
    half = task.metrics([[(wrong, first), (exact[1], second)]])["map"]
    assert 0 < half < 0.6
    # an overlap of 0.625 counts at 0.50, 0.55 and 0.60, three of the ten thresholds
    shifted = {"boxes": torch.tensor([[0.0, 0, 20, 12.5]]), "labels": torch.tensor([0]), "scores": torch.ones(1)}
    assert task.metrics([[(shifted, second)]])["map"] == pytest.approx(0.3, abs=1e-3)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert task.metrics([[(nothing, second)]], headline_only=True) == {"map": 0.0}


def test_a_crowd_is_no_mistake() -> None:
    task = DetectTask(PLAIN, 1, width=32)
    true = true_of([[0, 0, 20, 20], [50, 50, 100, 90]], [0, 0]) | {"iscrowd": torch.tensor([0, 1])}
    said = {"boxes": torch.tensor([[0.0, 0, 20, 20], [55, 55, 75, 75]]), "labels": torch.tensor([0, 0]), "scores": torch.tensor([0.5, 0.9])}  # fmt: skip
    assert task.metrics([[(said, true)]])["map"] == pytest.approx(1)


def test_a_width_that_fcos_cannot_norm() -> None:
    with pytest.raises(
        ValueError, match="width: fcos normalises 32 groups of channels; expected a multiple of 32, got 48"
    ):
        DetectTask(PLAIN, 2, width=48)


# ---- whole runs


def values(shapes: Path, out: Path, **changes: Any) -> dict[str, Any]:
    detect = {"task": {"name": "detect", "width": 32, "finest": 2}, "optim.steps": 4, "checkpoint_every_steps": 2}
    return test_segment.values(shapes, out, **{**detect, **changes})


def recipe(*args: Any, **changes: Any) -> FinetuneRecipe:
    return check_recipe(values(*args, **changes), FinetuneRecipe)


def test_boxes_in_images_of_five_channels_and_sixteen_bits(shapes: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "images").mkdir(parents=True)
        listed = json.loads((shapes / part / "annotations.json").read_text())
        for entry in listed["images"]:
            pixels = np.asarray(Image.open(shapes / part / "images" / entry["file_name"]), dtype=np.uint16)
            entry["file_name"] = Path(entry["file_name"]).with_suffix(".npy").name
            np.save(tmp_path / part / "images" / entry["file_name"], 16 * pixels[..., [0, 1, 2, 0, 1]])
        (tmp_path / part / "annotations.json").write_text(json.dumps(listed))
    deep = {"data.channels": 5, "data.value_range": [0, 4080]}
    mpp.finetune(recipe(tmp_path, tmp_path / "ft", **deep, **{"optim.steps": 30, "task.score_threshold": 0.0}))
    trial = tmp_path / "ft" / "scratch-seed0"
    with Image.open(trial / "predictions.png") as picture:
        assert min(picture.size) > 300
    rows, unreadable, _ = mpp.predict(trial, [str(tmp_path / "val" / "images")], report=tmp_path / "said")
    assert unreadable == {}
    assert len(list((tmp_path / "said" / "overlays").iterdir())) == 8
    assert all(0 <= row["x0"] < row["x1"] <= 32 for row in rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task.detector": "retinanet", "ema_decay": 0.9, "early_stop": {"every_steps": 2}},
        {"task.detector": "faster_rcnn", "architecture": CONVNEXT, "data.fraction": 0.5},
    ],
    ids=["fcos", "retinanet", "faster_rcnn, convnext"],
)
def test_a_run(shapes: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    result = mpp.finetune(recipe(shapes, tmp_path / "ft", **changes))
    trial = tmp_path / "ft" / "scratch-seed0"
    stored = json.loads((trial / "result.json").read_text())
    assert {"map", "map_50", "map_75", "map_small"} <= stored["metrics"].keys()
    assert stored["map_per_class"].keys() == {"disc", "square", "triangle"}
    assert result.verdicts[0].metric == "map"
    with Image.open(trial / "predictions.png") as picture:
        assert min(picture.size) > 300
    model, again, classes = load_dense(trial)
    assert (again.task.name, classes) == ("detect", ["disc", "square", "triangle"])
    kind = open_label_kind(again)
    images = kind.open(again.data.val, key="data.val", classes=None)
    batch = kind.judging_set(images).__getitems__(list(range(len(images))))
    with torch.no_grad():
        judged = model.task.judge(model.run, batch.images, batch.labels, (32, 32))
    assert model.task.metrics([judged])["map"] == pytest.approx(stored["metrics"]["map"], abs=2e-3)


def test_killed_and_resumed_it_is_the_same(shapes: Path, tmp_path: Path) -> None:
    mpp.finetune(recipe(shapes, tmp_path / "whole"))
    trial = tmp_path / "whole" / "scratch-seed0"
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    other = tmp_path / "cut" / "scratch-seed0"
    (other / "result.json").unlink()
    shutil.rmtree(other / "encoder")
    shutil.rmtree(other / "checkpoints" / "step-00000004")
    mpp.finetune(recipe(shapes, tmp_path / "cut"), resume="auto")
    for name in ("model", "head"):
        a, b = (load_file(t / "encoder" / f"{name}.safetensors") for t in (trial, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (trial / "result.json").read_text() == (other / "result.json").read_text()


def test_boxes_that_are_left_out_are_named(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "s")
    path = tmp_path / "s" / "train" / "annotations.json"
    coco = json.loads(path.read_text())
    coco["annotations"] += [{"image_id": 0, "category_id": 1, "bbox": [3, 3, 9, 0]}] * 2
    path.write_text(json.dumps(coco))
    words = r"data\.train: left out: 2 \(no pixel of its image\), such as .*bbox: \[3, 3, 9, 0\]"
    with pytest.warns(MppWarning, match=words):
        mpp.finetune(recipe(tmp_path / "s", tmp_path / "ft", **{"optim.steps": 1}))


@pytest.mark.exhaustive
@pytest.mark.parametrize("detector", ["fcos", "faster_rcnn"])
def test_on_two_processes(shapes: Path, tmp_path: Path, detector: str) -> None:
    """Losses are means over the objects that a process sees, so they are close to those of one process, not equal."""
    import yaml

    for out, processes in (("one", 1), ("two", 2)):
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(values(shapes, tmp_path / out, **{"task.detector": detector})))
        done = command("finetune", path, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = ([m["loss"] for m in read_metrics(tmp_path / o / "scratch-seed0")] for o in ("one", "two"))
    assert two[0] == pytest.approx(one[0], rel=0.2)
    a, b = (json.loads((tmp_path / o / "scratch-seed0" / "result.json").read_text()) for o in ("one", "two"))
    assert a["metrics"].keys() == b["metrics"].keys()
    assert a["unreadable"] == b["unreadable"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"balance": "loss"}, "balance: not with task: detect"),
        ({"distill.teacher": "x"}, "distill: not with task: detect"),
        ({"data.auto_augment": "rand-m9"}, "data: auto_augment: not with task: detect"),
        ({"data.val_side_px": 64}, "data: val_side_px: not with task: detect"),
        (
            {"task.detector": "yolo"},
            "task.detector: no such choice; got 'yolo'. Choose from fcos, retinanet, faster_rcnn",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    shapes: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        recipe(shapes, tmp_path / "ft", **changes)


def test_a_head_that_was_changed_is_refused(shapes: Path, tmp_path: Path) -> None:
    mpp.finetune(recipe(shapes, tmp_path / "ft", **{"optim.steps": 1}))
    head = tmp_path / "ft" / "scratch-seed0" / "encoder" / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    for look in (load_dense, mpp.verify):
        with pytest.raises(UserError, match=r"head\.safetensors: does not match the checksum"):
            look(tmp_path / "ft" / "scratch-seed0")
