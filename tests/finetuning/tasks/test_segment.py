"""Segmentation: windows, metrics and losses compared with values by hand and scikit-learn's, then whole runs."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score, recall_score

import mpp
from mpp.encoders.maps import FeatureMaps, probe_maps, read_maps
from mpp.errors import UserError
from mpp.finetuning.approaches import recipe_of_approach
from mpp.finetuning.model import build, load_dense
from mpp.finetuning.open_labels import open_label_kind
from mpp.finetuning.tasks import segment
from mpp.finetuning.tasks.segment import SegmentTask
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from mpp.runs.records import read_metrics
from mpp.training.batch_norms import batch_norms_of, choose_batches, measure_batch_norms
from tests.conftest import command

MAPS = FeatureMaps((8, 8), (4, 4))
VIT = {"name": "vit_tiny_patch16_224", "args": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}}
CONVNEXT = {"name": "convnextv2_atto", "args": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}}


def a_task(classes: int = 3, **keys: Any) -> SegmentTask:
    return SegmentTask(MAPS, classes, **keys)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(8, 70), st.integers(8, 70)),
    st.tuples(st.integers(4, 8), st.integers(4, 8)),
    st.floats(0, 0.9),
)
def test_windows_cover_the_image_and_overlap(size: tuple[int, int], window: tuple[int, int], overlap: float) -> None:
    places = a_task(window_overlap=overlap)._windows(size, window)
    seen = np.zeros(size, dtype=int)
    for y, x in places:
        assert 0 <= y <= size[0] - window[0]
        assert 0 <= x <= size[1] - window[1]
        seen[y : y + window[0], x : x + window[1]] += 1
    assert seen.min() >= 1
    tops = sorted({y for y, _ in places})
    steps = np.diff(tops)
    assert len(steps) == 0 or steps.max() <= max(round(window[0] * (1 - overlap)), 1) + 1
    assert len(set(places)) == len(places)


def pointwise(x: torch.Tensor) -> torch.Tensor:
    """Return logits of each pixel that depend on that pixel only, so windows must not change them."""
    v = x.float().mean(1, keepdim=True) / 255
    return torch.cat([1 - 2 * (v - 0.2).abs(), 1 - 2 * (v - 0.5).abs(), 1 - 2 * (v - 0.9).abs()], 1)


def test_windows_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, h, w), generator=rng, dtype=torch.uint8) for h, w in ((8, 8), (23, 9), (8, 31))]
    sizes = [(8, 8), (23, 9), (8, 31)]
    whole = [pointwise(i[None])[0].argmax(0) for i in images]
    for at_once in (1, 2, 64):
        monkeypatch.setattr(segment, "WINDOWS_AT_ONCE", at_once)
        found = a_task().predict(pointwise, images, sizes, (8, 8))
        assert all(torch.equal(a.long(), b) for a, b in zip(found, whole, strict=True))


def test_classes_at_another_size_are_those_of_interpolated_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 9, 13, generator=torch.Generator().manual_seed(1))
    whole = F.interpolate(logits[None], (31, 20), mode="bilinear", align_corners=False)[0].argmax(0)
    for limit in (2**26, 4 * 20 * 3):  # in one piece, and in bands of three rows
        monkeypatch.setattr(segment, "LOGITS_AT_ONCE", limit)
        assert (segment._classes_at(logits, (31, 20)).long() == whole).float().mean() > 0.998, (
            "classes may differ at ties only"
        )


def test_metrics_as_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1, 2, 255], (12, 17), p=[0.5, 0.3, 0.1, 0.1]).astype(np.uint8) for _ in range(5)]
    images = [torch.from_numpy(rng.integers(0, 256, (1, 12, 17), dtype=np.uint8)) for _ in masks]
    task = a_task()
    parts = [slice(0, 2), slice(2, 5)]
    judged = [task.judge(pointwise, images[p], [torch.from_numpy(m) for m in masks[p]], (12, 17)) for p in parts]
    true = np.concatenate([m.ravel() for m in masks])
    said = np.concatenate([pointwise(i[None])[0].argmax(0).numpy().ravel() for i in images])
    true, said = true[true != 255], said[true != 255]
    found = task.metrics(judged)
    assert found["miou"] == pytest.approx(jaccard_score(true, said, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx((true == said).mean())
    assert found["mean_accuracy"] == pytest.approx(recall_score(true, said, average="macro"))
    assert task.per_class(judged).tolist() == pytest.approx(jaccard_score(true, said, average=None).tolist())
    assert task.metrics(judged, headline_only=True) == {"miou": found["miou"]}


def test_a_class_that_nobody_has_or_says_does_not_count() -> None:
    total = torch.zeros(3, 3, dtype=torch.int64)
    total[0, 0], total[1, 0], total[1, 1] = 6, 2, 2
    assert a_task().metrics([total])["miou"] == pytest.approx((6 / 8 + 2 / 4) / 2)
    assert a_task().per_class([total]).isnan().tolist() == [False, False, True]


def test_an_ignored_class_is_never_said() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (1, 8, 8), dtype=np.uint8))
    task = a_task(ignore_index=1)
    (said,) = task.predict(pointwise, [image], [(16, 16)], (8, 8))
    assert set(said.flatten().tolist()) == {0, 2}
    judged = task.judge(pointwise, [image], [torch.from_numpy(rng.integers(0, 3, (8, 8), dtype=np.uint8))], (8, 8))
    assert task.per_class([judged]).isnan().tolist() == [False, True, False], "an ignored class must not be counted"


def test_the_loss_is_a_mean_over_images_whatever_the_batch() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 6, 6, generator=rng)
    masks = torch.randint(0, 3, (4, 6, 6), generator=rng).to(torch.uint8)
    masks[1, :5], masks[2] = 255, 255
    task = a_task()
    alone = [task.loss(logits[i : i + 1], masks[i : i + 1]) for i in range(4)]
    assert task.loss(logits, masks) == pytest.approx(float(torch.stack(alone).mean()))
    assert alone[2] == 0, "an image without labels must have a loss of 0"
    assert alone[1] == pytest.approx(float(F.cross_entropy(logits[1:2, :, 5:], masks[1:2, 5:].long())))
    task.weigh(torch.tensor([8, 2, 0]))
    assert task.class_weights is not None
    assert task.class_weights[:2].tolist() == [0.625, 2.5]


# ---- whole runs


def values(shapes: Path, out: Path, **changes: Any) -> dict[str, Any]:
    from mpp.recipe.overrides import apply_overrides

    v: dict[str, Any] = {
        "job": "finetune",
        "out": str(out),
        "encoder": "scratch",
        "architecture": deepcopy(VIT),
        "seeds": [0],
        "task": {"name": "segment", "width": 32, "finest": 2},
        "data": {
            "train": str(shapes / "train"), "val": str(shapes / "val"), "image_size": 32, "workers": 0,
            "crop_scale": [0.5, 1.0],
        },
        "optim": {"base_lr": 5e-2, "steps": 6, "global_batch_size": 8, "warmup_steps": 2},
        "log_every_steps": 1,
        "checkpoint_every_steps": 3,
    }  # fmt: skip
    apply_overrides(v, {}, changes)
    return v


def recipe(*args: Any, **changes: Any) -> FinetuneRecipe:
    return check_recipe(values(*args, **changes), FinetuneRecipe)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task.head": "linear", "data.color_jitter": 0.3, "balance": "loss", "ema_decay": 0.9},
        {"architecture": CONVNEXT, "frozen": 0.5, "scratch.frozen": 0.5},
        {"architecture": {"name": "swin_tiny_patch4_window7_224", "args": {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 4}}},
        {"data.val_side_px": 48, "early_stop": {"every_steps": 3}},
        {"data.channels": 1},
    ],
    ids=["fpn", "linear", "convnext", "swin", "windows", "grey"],
)  # fmt: skip
def test_a_run(shapes: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    result = mpp.finetune(recipe(shapes, tmp_path / "ft", **changes))
    trial = tmp_path / "ft" / "scratch-seed0"
    stored = json.loads((trial / "result.json").read_text())
    assert stored["metrics"].keys() == {"miou", "pixel_accuracy", "mean_accuracy"}
    assert stored["miou_per_class"].keys() == {"background", "disc", "square", "triangle"}
    assert result.verdicts[0].metric == "miou"
    assert [m["step"] for m in read_metrics(trial)] == list(range(1, 7))
    with Image.open(trial / "predictions.png") as picture:
        assert min(picture.size) > 300
    if "architecture" in changes or not changes:
        assert mpp.verify(trial).difference <= 1e-5, "the encoder must be plain timm"
    model, again, classes = load_dense(trial)
    assert (again, classes) == (
        recipe_of_approach(recipe(shapes, tmp_path / "ft", **changes), "scratch"),
        ["background", "disc", "square", "triangle"],
    )
    kind = open_label_kind(again)
    images = kind.open(again.data.val, key="data.val", classes=None)
    batch = kind.judging_set(images).__getitems__(list(range(len(images))))
    with torch.no_grad():
        judged = model.task.judge(model.run, batch.images, batch.labels, (32, 32))
    assert model.task.metrics([judged])["miou"] == pytest.approx(stored["metrics"]["miou"], abs=2e-3)


def test_batch_norms_have_the_statistics_of_training_crops(shapes: Path, tmp_path: Path) -> None:
    given = recipe(shapes, tmp_path / "ft", architecture={"name": "resnet10t"}, ema_decay=0.9)
    mpp.finetune(given)
    model, again, _ = load_dense(tmp_path / "ft" / "scratch-seed0")
    stored = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    kind = open_label_kind(again)
    images = kind.open(again.data.train, key="data.train", classes=None)
    dataset = kind.training_set(images, np.arange(len(images)), seed=0)
    crops = (
        dataset.__getitems__([(place, 0, place) for place in batch]).images
        for batch in choose_batches(range(len(images)))
    )
    measure_batch_norms(model, batch_norms_of(model), (model.normalise(x) for x in crops))
    assert stored
    for name, value in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(value, stored[name], rtol=1e-3, atol=1e-4)


def test_it_learns(tmp_path: Path) -> None:
    """A few steps suffice if the colour determines the class."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("images", "masks"):
            (tmp_path / part / name).mkdir(parents=True)
        for i in range(12):
            mask = np.zeros((32, 32), dtype=np.uint8)
            x, y = rng.integers(0, 16, 2)
            mask[y : y + 16, x : x + 16] = 1
            pixels = np.where(mask[..., None] > 0, [220, 60, 40], [30, 90, 160]) + rng.normal(0, 10, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / part / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / part / "masks" / f"{i}.png")
    result = mpp.finetune(recipe(tmp_path, tmp_path / "ft", **{"optim.steps": 40}))
    assert result.score["scratch"].mean > 0.8


BANDS = {"data.channels": 12, "data.value_range": [0, 10000]}


def draw_bands(folder: Path, count: int, side_px: int = 32) -> None:
    """Draw squares of 12 bands of 16 bits. Only the last two bands tell a square from what is around it."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((side_px, side_px), dtype=np.uint8)
            x, y = rng.integers(0, side_px // 2, 2)
            mask[y : y + side_px // 2, x : x + side_px // 2] = 1
            bands = rng.normal(3000, 300, (12, side_px, side_px))
            bands[10:] += np.where(mask > 0, 2500, -1500)
            np.save(folder / part / "images" / f"{i}.npy", bands.clip(0, 10000).astype(np.uint16))
            Image.fromarray(mask).save(folder / part / "masks" / f"{i}.png")


def test_it_learns_from_twelve_bands_of_sixteen_bits(tmp_path: Path) -> None:
    draw_bands(tmp_path, 12)
    result = mpp.finetune(recipe(tmp_path, tmp_path / "ft", **BANDS, **{"optim.steps": 40, "data.val_side_px": 48}))
    trial = tmp_path / "ft" / "scratch-seed0"
    assert result.score["scratch"].mean > 0.8
    with Image.open(trial / "predictions.png") as picture:
        assert min(picture.size) > 300
    rows, unreadable, _ = mpp.predict(trial, [str(tmp_path / "val" / "images")], report=tmp_path / "said")
    assert (len(rows), unreadable) == (12, {})
    for row in rows:
        true = np.asarray(Image.open(tmp_path / "val" / "masks" / f"{Path(row['image']).stem}.png"))
        assert (np.asarray(Image.open(row["mask"])) == true).mean() > 0.9


def test_an_array_of_another_size_than_its_mask_is_left_out(tmp_path: Path) -> None:
    """The size of an array is known only when it is read."""
    draw_bands(tmp_path, 4)
    np.save(tmp_path / "val" / "images" / "1.npy", np.zeros((12, 20, 16), dtype=np.uint16))
    mpp.finetune(recipe(tmp_path, tmp_path / "ft", **BANDS, **{"optim.steps": 2}))
    log = (tmp_path / "ft" / "scratch-seed0" / "train.log").read_text()
    assert f"{tmp_path}/val/images/1.npy: 16×20 pixels upright, its mask 32×32" in log


def test_killed_and_resumed_it_is_the_same(shapes: Path, tmp_path: Path) -> None:
    mpp.finetune(recipe(shapes, tmp_path / "whole"))
    trial = tmp_path / "whole" / "scratch-seed0"
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    other = tmp_path / "cut" / "scratch-seed0"
    (other / "result.json").unlink()
    shutil.rmtree(other / "encoder")
    shutil.rmtree(other / "checkpoints" / "step-00000006")
    mpp.finetune(recipe(shapes, tmp_path / "cut"), resume="auto")
    for name in ("model", "head"):
        a, b = (load_file(t / "encoder" / f"{name}.safetensors") for t in (trial, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (trial / "result.json").read_text() == (other / "result.json").read_text()


def test_pretrained_beside_scratch(shapes: Path, tmp_path: Path) -> None:
    from mpp.data.shards.pack import pack
    from tests.conftest import pretrain_recipe

    pack(str(shapes / "unlabeled"), str(tmp_path / "shards"), images_per_shard=50, labels=False, workers=1)
    small = {"encoder": VIT, "data.image_size": 32, "optim.steps": 2}
    mpp.pretrain(pretrain_recipe(tmp_path / "shards", tmp_path / "run", **small))
    cnn = {"args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}, "image_size": 32}
    others = {"beside": ["scratch", "cnn"], "cnn": cnn}
    given = recipe(shapes, tmp_path / "ft", architecture=None, encoder=str(tmp_path / "run"), **others)
    pretrained, scratch = (build(given, approach, 0, 4) for approach in ("pretrained", "scratch"))
    stored = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    assert all(torch.equal(pretrained.encoder.state_dict()[k], v) for k, v in stored.items())
    assert not torch.equal(scratch.encoder.state_dict()["blocks.0.mlp.fc1.weight"], stored["blocks.0.mlp.fc1.weight"])
    assert all(
        torch.equal(a, b) for a, b in zip(pretrained.task.parameters(), scratch.task.parameters(), strict=True)
    ), "all approaches must begin with the same head"
    result = mpp.finetune(given)
    assert result.score.keys() == {"pretrained", "scratch", "cnn"}
    assert result.gain is not None


@pytest.mark.slow
def test_on_two_processes_the_losses_are_those_of_one(shapes: Path, tmp_path: Path) -> None:
    import yaml

    for out, processes in (("one", 1), ("two", 2)):
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(values(shapes, tmp_path / out)))
        done = command("finetune", path, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = ([m["loss"] for m in read_metrics(tmp_path / o / "scratch-seed0")] for o in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixup": 0.5}, "mixup: not with task: segment"),
        ({"data.labels_per_class": 5}, "data: labels_per_class: not with task: segment; use data.fraction"),
        ({"data.erase": 0.2}, "data: erase: not with task: segment"),
        ({"pool": "token"}, "pool: not with task: segment"),
        ({"balance": "sampling"}, None),
        ({"lora": {}}, "lora: cannot be combined with encoder: scratch"),
        ({"data.val_side_px": 16}, "data: val_side_px: at least the shorter of image_size, 32"),
        ({"task.ignore_index": 256}, "task.ignore_index: must be >= 0 and <= 255"),
        ({"task.finest": 3}, "task.finest: no such choice; got 3. Choose from 1, 2, 4"),
        ({"task": "classify", "data.val_side_px": 50}, "data: val_side_px: not with task: classify"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    shapes: Path, tmp_path: Path, changes: dict[str, Any], words: str | None
) -> None:
    with pytest.raises(UserError, match=words or "balance"):
        recipe(shapes, tmp_path / "ft", **changes)


def test_one_class_alone_and_nothing_to_judge_by(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "s")
    for part in ("train", "val"):
        (tmp_path / "s" / part / "classes.txt").unlink()
    for path in (tmp_path / "s" / "val" / "masks").iterdir():
        Image.new("L", (32, 32), 255).save(path)
    with pytest.raises(UserError, match=r"data\.val: .*every pixel has the value 255"):
        mpp.finetune(recipe(tmp_path / "s", tmp_path / "a"))
    for part in ("train", "val"):
        for path in (tmp_path / "s" / part / "masks").iterdir():
            Image.new("L", (32, 32), 0).save(path)
    with pytest.raises(UserError, match=r"data\.train: only one class \(0\); at least two are needed$"):
        mpp.finetune(recipe(tmp_path / "s", tmp_path / "b"))
    half = np.zeros((32, 32), dtype=np.uint8)
    half[16:] = 255
    for part in ("train", "val"):
        for path in (tmp_path / "s" / part / "masks").iterdir():
            Image.fromarray(half).save(path)
    said = r"only one class \(0\).* also hold the value 255 at \d+ pixels; it is task\.ignore_index .* write it as 1"
    with pytest.raises(UserError, match=said):
        mpp.finetune(recipe(tmp_path / "s", tmp_path / "c"))


def test_masks_are_no_classes_of_images(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train: .* holds images/ and masks/, for task: segment"):
        mpp.finetune(recipe(shapes, tmp_path / "a", task="classify"))


def test_a_model_without_maps_and_a_size_that_does_not_tile(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.image_size: the encoder has a stride of 8 px; expected multiples of it, got 30×32"
    ):
        mpp.finetune(recipe(shapes, tmp_path / "a", **{"data.image_size": [30, 32]}))
    with pytest.raises(UserError, match="gives 27×27 cells at 224×224 px, where a stride of 8 px makes 28×28"):
        mpp.finetune(
            recipe(
                shapes,
                tmp_path / "b",
                **{"architecture.name": "pit_ti_224", "architecture.args": {}, "data.image_size": 224},
            )
        )


@pytest.mark.parametrize(
    ("name", "args", "indices", "strides"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2}, [2, 5, 8, 11], (8, 8, 8, 8)),
        ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, [0, 1], (8, 8)),
        ("convnextv2_atto", CONVNEXT["args"], [0, 1, 2, 3], (4, 8, 16, 32)),
        ("mobilenetv3_small_050", {}, [1, 2, 3, 4], (4, 8, 16, 32)),
    ],
)  # fmt: skip
def test_which_blocks_are_read(name: str, args: dict[str, Any], indices: list[int], strides: tuple[int, ...]) -> None:
    import timm

    model = timm.create_model(name, num_classes=0, **({"img_size": 64} if "vit" in name else {}), **args)
    found, maps = probe_maps(model, (64, 64))
    assert (found, maps.strides) == (indices, strides)
    given = read_maps(model, torch.randn(1, 3, 64, 64), found)
    assert tuple(m.shape[1] for m in given) == maps.dims
    torch.stack([m.sum() for m in given]).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained), "parameters that no map depends on must be frozen"
