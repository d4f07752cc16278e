"""Several labels per image: metrics, sources, and keys that the task refuses."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as theirs

import mpp
from mpp.data.labeled import Labeled, open_labeled
from mpp.data.subsets import split
from mpp.errors import MppWarning, UserError
from mpp.finetuning.tasks.multilabel import MultilabelTask
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from tests.conftest import encoded

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}


def quarters(number: int) -> tuple[Image.Image, list[str]]:
    """Return a grey image with a square of each colour in another corner, and the colours.

    One pixel differs from that of any other image.
    """
    rng = np.random.default_rng(number)
    image, found = Image.new("RGB", (16, 16), (128, 128, 128)), []
    image.putpixel((15, 15), (number, number, number))
    for i, (name, colour) in enumerate(COLOURS.items()):
        if rng.random() < 0.5:
            image.paste(colour, (8 * (i % 2), 8 * (i // 2), 8 * (i % 2) + 8, 8 * (i // 2) + 8))
            found.append(name)
    return image, found


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write train.csv of 60 images and val.csv of 40. Some images have no label."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "images").mkdir()
    for name, numbers in (("train", range(60)), ("val", range(60, 100))):
        with open(folder / f"{name}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["image", "labels", "remark"])
            for i in numbers:
                image, labels = quarters(i)
                (folder / "images" / f"{i}.png").write_bytes(encoded(image))
                writer.writerow([f"images/{i}.png", "; ".join(labels), "none"])
    return folder


def opened(spec: Path | str, **changes: Any) -> Labeled:
    given: dict[str, Any] = {"key": "data.train", "classes": None, "several": True, **changes}
    return open_labeled((str(spec),), cache_dir=None, cache_limit_bytes=1e9, **given)


def values(tables: Path, out: Path, **changes: Any) -> dict[str, Any]:
    from mpp.recipe.overrides import apply_overrides

    v: dict[str, Any] = {
        "job": "finetune", "out": str(out), "encoder": "scratch", "task": "multilabel", "seeds": [0],
        "architecture": {
            "name": "vit_tiny_patch16_224", "args": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "data": {
            "train": str(tables / "train.csv"), "val": str(tables / "val.csv"), "image_size": 16, "workers": 0,
            "crop_scale": [0.9, 1.0],
        },
        "optim": {"base_lr": 3e-2, "steps": 60, "global_batch_size": 20, "warmup_steps": 3},
    }  # fmt: skip
    apply_overrides(v, {}, changes)
    return v


def tuned(tables: Path, out: Path, **changes: Any) -> Any:
    return mpp.finetune(check_recipe(values(tables, out, **changes), FinetuneRecipe))


def test_it_learns_and_says_all_labels(tables: Path, tmp_path: Path) -> None:
    result = tuned(tables, tmp_path / "o", early_stop={"every_steps": 20, "fraction": 0.2})
    assert result.verdicts[0].metric == "map"
    assert result.score["scratch"].mean > 0.9
    stored = json.loads((tmp_path / "o" / "result.json").read_text())
    assert stored["metric"] == "map"
    assert stored["verdicts"][0]["metrics"]["scratch"].keys() == {"map", "auroc", "ece"}
    trial = tmp_path / "o" / "scratch-seed0"
    mpp.verify(trial)
    rows, _, _ = mpp.predict(trial, [str(tables / "images" / f"{i}.png") for i in range(60, 100)], top=3)
    right = []
    for i, row in zip(range(60, 100), rows, strict=True):
        said = {row[f"class{s}"] for s in ("", "_2", "_3") if row[f"probability{s}"] > 0.5}
        right.append(said == set(quarters(i)[1]))
    assert np.mean(right) > 0.7, "each class has its own probability, so none, one or several are above one half"
    with pytest.raises(UserError, match="--report: only for one label an image"):
        mpp.predict(trial, [str(tables / "images")], report=tmp_path / "r")


def test_as_scikit_learn() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = (torch.rand(200, 4, generator=rng) < 0.3).float()
    labels[:, 3] = 0  # label 3 never occurs
    labels[:, 2] = 1  # label 2 is in every image
    logits = torch.randn(200, 4, generator=rng) + labels
    found = MultilabelTask(8, 4).metrics([(logits[:50], labels[:50]), (logits[50:], labels[50:])])
    p, y = logits.sigmoid().numpy(), labels.numpy()
    assert found["map"] == pytest.approx(np.mean([theirs.average_precision_score(y[:, c], p[:, c]) for c in (0, 1, 2)]))
    assert found["auroc"] == pytest.approx(np.mean([theirs.roc_auc_score(y[:, c], p[:, c]) for c in (0, 1)]), abs=1e-6)
    assert 0 < found["ece"] < 1


def test_a_table(tables: Path) -> None:
    data = opened(tables / "train.csv")
    assert data.classes == ["blue", "green", "red"]
    assert data.labels.shape == (60, 3)
    assert [sorted(np.array(data.classes)[row]) for row in data.labels] == [sorted(quarters(i)[1]) for i in range(60)]
    assert not data.labels.any(1).all(), "an image may have no label"
    assert len(data.subset(labels_per_class=None, fraction=0.5, seed=0)) == 30
    fit, tune = split(data.strata, 0.25, 0)
    assert (len(fit), len(tune)) == (45, 15)


def test_a_table_of_one_label_each(tables: Path, tmp_path: Path) -> None:
    path = tables / "single.csv"
    path.write_text("label,image\nb,images/0.png\na,images/1.png\nb,images/2.png\n")
    data = opened(path, several=False)
    assert (data.classes, data.labels.tolist()) == (["a", "b"], [1, 0, 1])
    assert data.reader.read(1) == (tables / "images" / "1.png").read_bytes()


def test_shards_and_class_folders(image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i, labels in enumerate([["b", "a"], [], [7]]):
            for name, content in (
                (f"{i}.png", encoded(quarters(i)[0])),
                (f"{i}.json", json.dumps({"labels": labels}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = opened(tmp_path / "s.tar")
    assert data.classes == ["7", "a", "b"]
    assert data.labels.tolist() == [[False, True, True], [False] * 3, [True, False, False]]
    folders = opened(image_folder)
    assert folders.labels.sum(0).tolist() == [30, 30]
    assert folders.labels.sum(1).tolist() == [1] * 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv:1: needs the columns image and labels; got nothing"),
        ("file,labels\na,b\n", r"t\.csv:1: needs the columns image and labels; got file, labels"),
        ("image,labels\n", r"t\.csv: no images in it"),
        ("image,labels\na.png,b,c\n", r"t\.csv:2: 3 columns, where the first line has 2"),
        (
            'image,labels\na.png,b\nc.png,"b,c"\n',
            r"t\.csv:3: labels: 'b,c': several labels are separated by ';', not by ','",
        ),
        (
            "image,labels\na.png,b|c\n",
            r"t\.csv:2: labels: 'b|c': .* not by '\|'. If this is one label, end it with ';'",
        ),
        (
            "image,labels\na.png,b;c\na.png,b\n",
            r"t\.csv:3: a.png is named twice, with different labels: b; line 2 has b, c",
        ),
        ("image,labels\na.png,b\nc.png,b;purple\n", r"t\.csv:3: 'purple' is none of the 1 classes of the training"),
    ],
)
def test_wrong_tables(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "t.csv", classes=["b"])


def test_a_comma_in_a_label(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('image,labels\na.png,"stork, white;"\nb.png,owl\n')
    assert opened(tmp_path / "t.csv").classes == ["owl", "stork, white"]


def test_one_finding_present_or_not(tables: Path, tmp_path: Path) -> None:
    """A single class is judged against its absence. Without any label, there is nothing to learn."""
    rows = [f"images/{i}.png,{'tumour' if i % 3 == 0 else ''}" for i in range(12)]
    (tables / "one.csv").write_text("\n".join(["image,labels", *rows]) + "\n")
    one = {"data.train": str(tables / "one.csv"), "data.val": str(tables / "one.csv")}
    with pytest.warns(MppWarning, match="the same images as data.train"):
        result = tuned(tables, tmp_path / "o", **one)
    metrics = result.verdicts[0].metrics["scratch"]
    assert 0 < metrics["map"].mean <= 1
    assert 0 <= metrics["auroc"].mean <= 1
    (tables / "none.csv").write_text("image,labels\nimages/0.png,\nimages/1.png,\n")
    for part in ("train", "val"):
        with pytest.raises(UserError, match=rf"data\.{part}: not one image has a label; the first: .*none\.csv:2"):
            tuned(tables, tmp_path / part, **{**one, f"data.{part}": str(tables / "none.csv")})


def test_a_table_without_a_label(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,label\na.png,b\nc.png,\n")
    with pytest.raises(UserError, match=r"t\.csv:3: no label"):
        opened(tmp_path / "t.csv", several=False)
    with pytest.raises(UserError, match=r"none\.csv: No such file"):
        opened(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": 0.5}, "mixup: not with task: multilabel"),
        ({"balance": "loss"}, "balance: not with task: multilabel"),
        ({"distill.teacher": "x"}, "distill: not with task: multilabel"),
        ({"data.labels_per_class": 5}, "labels_per_class: not with task: multilabel; use data.fraction"),
    ],
)
def test_what_does_not_go_with_it(changes: dict[str, Any], message: str, tables: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tuned(tables, tmp_path / "o", **changes)
    assert not (tmp_path / "o").exists()
