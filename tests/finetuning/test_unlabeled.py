"""Unlabeled images in fine-tuning: which are used, what they teach, and replaying a run that has them."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import Tensor

import mpp
from mpp.data.leak import find_shared
from mpp.data.readers import PackedReader
from mpp.data.shards.reader import ShardImages
from mpp.data.unlabeled_sets import WithUnlabeled
from mpp.errors import MppWarning, UserError
from mpp.finetuning import micro_loss
from mpp.finetuning.consistency import Alignment, FixMatch, MixMatch
from mpp.finetuning.distillation import Distillation
from mpp.finetuning.model import Classifier
from mpp.finetuning.open_labels import open_label_kind
from mpp.finetuning.unlabeled import add_unlabeled, open_unlabeled
from mpp.inspection.replay import replay
from mpp.parallel.team import start_team
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from mpp.runs.records import read_metrics
from tests.conftest import drawn_image, encoded
from tests.finetuning.test_finetuning import ARGS, values

SCRATCH = {"architecture": {"name": "vit_tiny_patch16_224", "args": ARGS}}


def recipe(shards: Path, out: Path, images: Path | str, **changes: Any) -> FinetuneRecipe:
    small = {"seeds": [0], "ema_decay": 0.9, "optim.steps": 4, **SCRATCH, "unlabeled.images": str(images)}
    return check_recipe(values(shards, out, "scratch", **small | changes), FinetuneRecipe)


def dataset(made: FinetuneRecipe) -> WithUnlabeled:
    kind = open_label_kind(made)
    train = kind.open(made.data.train, key="data.train", classes=None)
    opened = open_unlabeled(made, start_team("fp32"), kind.open(made.data.val, key="data.val", classes=train.classes))
    assert opened is not None
    return add_unlabeled(kind.training_set(train, np.arange(20), 0), opened, made, seed=0, total_steps=4)


def test_the_views_are_a_function_of_the_position_alone(shards: Path, tmp_path: Path) -> None:
    images = dataset(recipe(shards, tmp_path, shards))
    whole = images.__getitems__([(position, 0, position) for position in range(20, 40)])
    assert whole.weak is not None
    assert whole.weak.shape == whole.strong.shape == (60, 3, 16, 16)
    again = dataset(recipe(shards, tmp_path, shards))
    for first, last in ((35, 40), (20, 30), (30, 35)):
        part = again.__getitems__([(position, 0, position - 20) for position in range(first, last)])
        cut = slice(3 * (first - 20), 3 * (last - 20))
        assert torch.equal(part.weak, whole.weak[cut])
        assert torch.equal(part.strong, whole.strong[cut])
    assert not torch.equal(whole.weak, whole.strong)
    other = dataset(recipe(shards, tmp_path, shards)).__getitems__([(p, 0, p) for p in range(20)])
    assert not torch.equal(other.weak, whole.weak)


def test_validation_images_are_left_out_and_counted(shards: Path, tmp_path: Path) -> None:
    made = recipe(shards, tmp_path / "run", shards)
    images = dataset(made).unlabeled
    reader = PackedReader(ShardImages((str(shards),), key="x"))
    names = {
        name.split("/")[-1]
        for name in map(reader.name, find_shared(reader, PackedReader(ShardImages(made.data.val, key="x"))))
    }
    assert len(names) == 25
    assert [len(rows) for rows in images.rows] == [0, 25, 10], "one of three shards is the validation set"
    shown = []
    images._augment = lambda data, position: shown.append(data) or [torch.zeros(1), torch.zeros(1)]  # type: ignore[method-assign]
    labeled = dataset(made)
    labeled.unlabeled = images
    for start in range(0, 200, 20):
        labeled.__getitems__([(start + i, 0, i) for i in range(20)])
    judged = {reader.read(i) for i in find_shared(reader, PackedReader(ShardImages(made.data.val, key="x")))}
    assert not judged & set(shown)
    assert len(set(shown)) == 35, "all other images must be used"
    assert len(shown) == 600
    mpp.finetune(made)
    told = json.loads((tmp_path / "run" / "data.json").read_text())["unlabeled"]
    assert told == {"images": 35, "left_out": 25}
    with pytest.raises(UserError, match=r"unlabeled\.images: all of these images are also validation images"):
        mpp.finetune(recipe(shards, tmp_path / "none", shards / "shard-000000.tar"))
    assert not (tmp_path / "none").exists()


class Says(torch.nn.Module):
    """A stand-in for an averaged model: the first pixels of an image are its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def normalise(self, images: Tensor) -> Tensor:
        return images.float()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


def fixmatch(averaged: Any = None, **changes: Any) -> FixMatch:
    how: dict[str, Any] = {
        "threshold": 0.9, "weight": 2.0, "start_step": 0, "warmup_steps": 0, "erase": 0.0,
        "independent_classes": False, "autocast": nullcontext, **changes,
    }  # fmt: skip
    return FixMatch(averaged or Says(), **how)


def test_batch_norms_of_the_teacher_see_weak_views_alone() -> None:
    """The batch norms of the model have seen strong views, so the teacher takes the statistics of the weak ones."""
    averaged = torch.nn.Sequential(Says(), torch.nn.BatchNorm1d(3, affine=False))
    averaged.mean, averaged.normalise = averaged[0].mean, averaged[0].normalise
    weak = torch.tensor([[5.0, 2.0, 0.0, 0], [5.0, 1.0, 0.0, 0], [9.0, 1.0, 0.0, 0]]).view(3, 1, 2, 2)
    ours = fixmatch(averaged)
    assert ours.teach(weak, encoder_learns=True).targets.tolist() == [1, 2, 0]
    assert averaged[1].running_mean.tolist() == [0, 0, 0], "running statistics must stay unchanged"
    assert averaged[1].num_batches_tracked == 0
    assert ours.teach(weak, encoder_learns=False).targets.tolist() == [0, 0, 0]
    assert ours.teach(weak[:1], encoder_learns=True).targets.tolist() == [0], "one image is not enough for statistics"


def test_what_is_sure_is_learned_and_the_rest_is_not() -> None:
    weak = torch.tensor([[9.0, 0, 0, 0], [1.0, 0, 0, 0], [0.0, 0, 9.0, 0]]).view(3, 1, 2, 2)
    logits = torch.zeros(3, 3, requires_grad=True)
    taught = fixmatch().teach(weak, encoder_learns=True)
    loss = fixmatch().loss(logits, taught, 3, step=0)
    # Two of three images are sure. Each costs log 3 at logits of zero. The loss is the mean over all three times the
    # weight.
    assert loss.item() == pytest.approx(2 * 2 / 3 * np.log(3), rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().sum() == 0
    assert logits.grad.argmin(-1)[[0, 2]].tolist() == [0, 2], "the predicted classes must rise"
    rising = [fixmatch(warmup_steps=4).loss(logits, taught, 3, step).item() for step in (0, 1, 3, 9)]
    assert rising == pytest.approx([loss.item() * part for part in (0.25, 0.5, 1, 1)])
    assert fixmatch(warmup_steps=4, start_step=6).weight_at(7) == fixmatch(warmup_steps=4).weight_at(1) == 1


@pytest.mark.parametrize("independent_classes", [False, True])
def test_images_of_which_nothing_is_sure_may_be_left_out(independent_classes: bool) -> None:
    weak = torch.tensor([[9.0, 0, 0, 0], [1.0, 0, 0, 0], [0.0, 0, 9.0, 0]]).view(3, 1, 2, 2)
    logits = torch.arange(9.0).view(3, 3)
    ours = fixmatch(independent_classes=independent_classes)
    taught = ours.teach(weak, encoder_learns=True)
    kept_logits, kept = taught.keep_sure(logits)
    assert kept_logits.tolist() == logits[[0, 2]].tolist()
    assert ours.loss(kept_logits, kept, 3, step=0).item() == pytest.approx(ours.loss(logits, taught, 3, step=0).item())
    nothing = ours.teach(torch.zeros_like(weak), encoder_learns=True).keep_sure(logits.requires_grad_())
    loss = ours.loss(*nothing, 3, step=0)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()  # type: ignore[union-attr]


def test_of_several_classes_each_counts_by_itself() -> None:
    weak = torch.tensor([[9.0, -9.0, 0.0, 0]]).view(1, 1, 2, 2)
    logits = torch.zeros(1, 3, requires_grad=True)
    ours = fixmatch(independent_classes=True, weight=1.0)
    loss = ours.loss(logits, ours.teach(weak, encoder_learns=True), 1, step=0)
    assert loss.item() == pytest.approx(2 / 3 * np.log(2), rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert [np.sign(g) for g in logits.grad[0].tolist()] == [-1, 1, 0]


def mixmatch(mix: Mixup | None, **changes: Any) -> MixMatch:
    how: dict[str, Any] = {
        "temperature": 0.5, "weight": 3.0, "start_step": 0, "warmup_steps": 0, "erase": 0.0, "alignment": None,
        "autocast": nullcontext, **changes,
    }  # fmt: skip
    return MixMatch(Says(), mix=mix, **how)  # type: ignore[arg-type]


def test_mixmatch_learns_sharpened_probabilities_of_every_image() -> None:
    weak = torch.tensor([[2.0, 0.5, 0.0, 0], [0.0, 0.1, 0.0, 0]]).view(2, 1, 2, 2)
    ours = mixmatch(None, warmup_steps=4)
    taught = ours.teach(weak, encoder_learns=True)
    squared = weak.flatten(1)[:, :3].softmax(-1) ** 2
    torch.testing.assert_close(taught, squared / squared.sum(-1, keepdim=True))
    images, labels = torch.rand(3, 1, 2, 2), torch.tensor([1])
    same, targets = ours.mixed(images, labels, taught, step=1)
    assert torch.equal(same, images)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    of_labeled = torch.nn.functional.cross_entropy(logits[:1], labels)
    of_unlabeled = torch.nn.functional.cross_entropy(logits[1:], taught)
    torch.testing.assert_close(ours.loss(logits, targets), of_labeled + 3 * 2 / 4 * of_unlabeled)


class Several:
    """A stand-in for a team of several processes. `others` is the sum of the other processes."""

    def __init__(self, world: int, others: Tensor) -> None:
        self.world, self.others = world, others

    def sum_tensor(self, values: Tensor) -> Tensor:
        return values + self.others


def test_a_model_that_knows_nothing_teaches_the_class_fractions_of_the_labels() -> None:
    """A model that prefers class 0 in every image is corrected as soon as the mean has followed its predictions."""
    fractions, made, skipped = torch.tensor([0.2, 0.3, 0.5]), torch.tensor(True), torch.tensor(False)
    team, alignment = start_team("fp32"), Alignment(fractions)
    same = torch.tensor([3.0, 1.0, 0.0]).expand(500, 3)
    mean = same[0].softmax(-1)
    alignment.align(same, 0.5)
    alignment.end_step(team, only_if=made)
    torch.testing.assert_close(alignment.mean, fractions + (mean - fractions) / 100)
    alignment.align(same * torch.nan, 0.5)
    alignment.end_step(team, only_if=skipped)
    torch.testing.assert_close(alignment.mean, fractions + (mean - fractions) / 100)
    for _ in range(1500):
        for part in (same[:200], same[200:]):  # micro-batches of one step
            alignment.align(part, 0.5)
        alignment.end_step(team, only_if=made)
    torch.testing.assert_close(alignment.mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alignment.align(same, 0.5), fractions.expand(500, 3), rtol=1e-3, atol=1e-3)


def test_the_mean_is_that_of_all_processes() -> None:
    fractions = torch.tensor([0.25, 0.75])
    logits = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    whole, half = Alignment(fractions), Alignment(fractions)
    whole.align(logits, 0.5)
    whole.end_step(start_team("fp32"), only_if=torch.tensor(True))
    half.align(logits[:4], 0.5)
    others = logits[4:].softmax(-1).sum(0)
    half.end_step(Several(2, others), only_if=torch.tensor(True))  # type: ignore[arg-type]
    torch.testing.assert_close(half.mean, whole.mean)
    assert not torch.equal(whole.mean, fractions)


def test_mixmatch_sharpens_between_the_mean_and_the_fractions() -> None:
    weak = torch.tensor([[2.0, 0.5, 0.0, 0], [0.0, 0.1, 0.0, 0]]).view(2, 1, 2, 2)
    fractions, mean = torch.tensor([0.2, 0.3, 0.5]), [0.5, 0.3, 0.2]
    taught = mixmatch(None, alignment=Alignment(fractions, mean)).teach(weak, encoder_learns=True)
    aligned = (weak.flatten(1)[:, :3].softmax(-1) / torch.tensor(mean)) ** 2 * fractions
    torch.testing.assert_close(taught, aligned / aligned.sum(-1, keepdim=True))


def test_the_class_fractions_are_those_of_all_training_images(shards: Path, tmp_path: Path) -> None:
    """They are not those of the images that `labels_per_class` or `balance` choose."""
    for name, count in (("disc", 3), ("square", 9)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.png").write_bytes(encoded(drawn_image(100 * count + i), "PNG"))
    changes: dict[str, Any] = {"data.train": str(tmp_path / "train"), "optim.steps": 1}
    changes |= {"data.labels_per_class": 2, "unlabeled.kind": "mixmatch", "balance": "sampling"}
    seen: list[Tensor] = []

    class Watched(Alignment):
        def __init__(self, class_fractions: Tensor, mean: list[float] | None = None) -> None:
            seen.append(class_fractions)
            super().__init__(class_fractions, mean)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_loss, "Alignment", Watched)
        mpp.finetune(recipe(shards, tmp_path / "run", shards, **changes))
    assert [of_one.tolist() for of_one in seen] == [[0.25, 0.75]]


@pytest.mark.parametrize("kind", ["fixmatch", "mixmatch"])
def test_until_they_start_the_run_is_that_of_labels_alone(kind: str, shards: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"unlabeled.kind": kind, "unlabeled.threshold": 0.1, "unlabeled.start": 0.5}
    losses = {}
    for name, how in {"later": changes, "never": {"unlabeled": None}}.items():
        mpp.finetune(recipe(shards, tmp_path / name, shards, mixup=0.4, **how))
        losses[name] = [m["loss"].hex() for m in read_metrics(tmp_path / name / "scratch-seed0")]
    same = [a == b for a, b in zip(losses["later"], losses["never"], strict=True)]
    assert same == [True, True, False, False]


def test_a_run_with_alignment_continues_alike(shards: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"unlabeled.kind": "mixmatch", "unlabeled.start": 0.25, "mixup": 0.4}
    changes |= {"optim.steps": 8, "checkpoint_every_steps": 2, "keep_checkpoints": 9}
    losses = {}
    for align in (True, False):
        made = recipe(shards, tmp_path / str(align), shards, **changes, **{"unlabeled.align": align})
        mpp.finetune(made)
        losses[align] = [m["loss"].hex() for m in read_metrics(tmp_path / str(align) / "scratch-seed0")]
    assert losses[True][:2] == losses[False][:2], "nothing is aligned before unlabeled images come"
    assert losses[True][4:] != losses[False][4:]
    trial = tmp_path / "True" / "scratch-seed0"
    (trial / "result.json").unlink()
    for step in (6, 8):
        shutil.rmtree(trial / "checkpoints" / f"step-{step:08d}")
    mean = json.loads((trial / "checkpoints" / "step-00000004" / "state.json").read_text())["mean_prediction"]
    assert sum(mean) == pytest.approx(1)
    mpp.finetune(recipe(shards, tmp_path / "True", shards, **changes), resume="auto")
    assert [m["loss"].hex() for m in read_metrics(trial)] == losses[True]


def test_mixmatch_mixes_targets_as_images() -> None:
    """Each image's pixels are its weighted target, so after mixing they still must be."""
    np.random.seed(0)
    torch.manual_seed(0)
    ours = mixmatch(Mixup(0.8, 0.0, label_smoothing=0.0, num_classes=4, multi_label=True))
    labels = torch.tensor([2, 0])
    taught = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0], [1.0, 0, 0, 0]])
    _, targets = mixmatch(None).mixed(torch.zeros(6, 1, 2, 2), labels, taught, step=0)
    assert targets.sum().item() == pytest.approx(1 + 3)
    images = targets.view(6, 1, 2, 2).clone()
    mixed, mixed_targets = ours.mixed(images, labels, taught, step=0)
    torch.testing.assert_close(mixed.flatten(1), mixed_targets)
    assert mixed_targets.sum().item() == pytest.approx(1 + 3)
    assert not torch.equal(mixed_targets.sort(0).values, targets.sort(0).values), "nothing was mixed"


def test_they_change_what_is_learned_and_may_move(shards: Path, tmp_path: Path) -> None:
    images = shutil.copytree(shards, tmp_path / "images")
    losses = {}
    ways: dict[str, dict[str, Any]] = {"with": {"unlabeled.threshold": 0.1}, "without": {"unlabeled": None}}
    ways["mixmatch"] = {"unlabeled.kind": "mixmatch"}
    ways["mixed"] = {"unlabeled.kind": "mixmatch", "mixup": 0.4}
    for name, changes in ways.items():
        mpp.finetune(recipe(shards, tmp_path / name, images, **changes))
        losses[name] = [m["loss"] for m in read_metrics(tmp_path / name / "scratch-seed0")]
    assert len({tuple(of_one) for of_one in losses.values()}) == 4
    (tmp_path / "images").rename(tmp_path / "moved")
    made = recipe(shards, tmp_path / "with", tmp_path / "moved", **{"unlabeled.threshold": 0.1})
    assert mpp.finetune(made, resume="auto").state == "finished"
    other = recipe(shards, tmp_path / "with", shards / "shard-000001.tar", **{"unlabeled.threshold": 0.1})
    with pytest.raises(UserError, match="the data changed since|data or the encoder changed since"):
        mpp.finetune(other, resume="auto")


def test_a_cpu_computes_only_those_that_teach(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: dict[float, list[int]] = {0.1: [], 0.999: []}
    forward = Classifier.forward

    def count_images(model: Classifier, x: Tensor, *rest: Any) -> Any:
        if model.training:
            computed[threshold].append(len(x))
        return forward(model, x, *rest)

    monkeypatch.setattr(Classifier, "forward", count_images)
    for threshold in computed:
        made = recipe(shards, tmp_path / str(threshold), shards, **{"unlabeled.threshold": threshold})
        mpp.finetune(made)
    labeled = made.optim.global_batch_size
    assert computed == {0.1: [4 * labeled] * 4, 0.999: [labeled] * 4}


@pytest.mark.parametrize("kind", ["fixmatch", "mixmatch"])
def test_a_step_with_them_is_replayed(kind: str, shards: Path, tmp_path: Path) -> None:
    steep = {"optim.base_lr": 1e25, "optim.warmup_steps": 0, "unlabeled.threshold": 0.1, "optim.steps": 6}
    steep |= {"unlabeled.kind": kind, "mixup": 0.4}
    with pytest.raises(UserError, match="stopped before the update"):
        mpp.finetune(recipe(shards, tmp_path / "run", shards, **steep))
    replayed = replay(tmp_path / "run")
    assert replayed.same
    kept = sorted((tmp_path / "run" / "scratch-seed0" / "non-finite").iterdir())[-1]
    assert (kept / "averaged.safetensors").exists(), (
        "the averaged model's predictions depend on its weights, which must be kept"
    )


def test_images_are_replayed_alone_through_batch_norms(shards: Path, tmp_path: Path) -> None:
    """The last maps of this encoder have one value for each image and channel."""
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
    steep = {"optim.base_lr": 1e25, "optim.warmup_steps": 0, "optim.steps": 6, "unlabeled.kind": "mixmatch"}
    small = {"architecture": {"name": "resnet18d", "args": args}, "data.image_size": 32}
    with pytest.raises(UserError, match="stopped before the update"):
        mpp.finetune(recipe(shards, tmp_path / "run", shards, **steep, **small))
    replayed = replay(tmp_path / "run")
    assert replayed.same
    assert any("by itself" in line for line in replayed.lines)


def test_a_step_with_alignment_is_replayed(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is not finite but the loss is, so the replay shows whether the same mean was used."""
    spoilt = MixMatch.loss

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * torch.nan

    steps: list[int] = []

    def loss_of_step(self: MixMatch, logits: Tensor, targets: Tensor) -> Tensor:
        steps.append(len(steps))
        loss = spoilt(self, logits, targets)
        made: Tensor = Spoil.apply(loss) if len(steps) == 8 else loss  # type: ignore[no-untyped-call]
        return made

    monkeypatch.setattr(MixMatch, "loss", loss_of_step)
    changes: dict[str, Any] = {"unlabeled.kind": "mixmatch", "optim.steps": 10, "max_skipped_steps": 1}
    mpp.finetune(recipe(shards, tmp_path / "run", shards, **changes, mixup=0.4, **{"optim.base_lr": 0.5}))
    assert replay(tmp_path / "run").same
    (record,) = (tmp_path / "run" / "scratch-seed0" / "non-finite").glob("*/rank0.json")
    values = json.loads(record.read_text())
    assert values["losses"][0][0] != "nan"
    record.write_text(json.dumps(values | {"mean_prediction": [0.9, 0.1]}))
    assert not replay(tmp_path / "run").same


def test_a_score_that_stands_still_before_they_start_ends_nothing(shards: Path, tmp_path: Path) -> None:
    stop = {"fraction": 0.4, "every_steps": 2, "patience": 2}
    changes: dict[str, Any] = {"early_stop": stop, "optim.steps": 24, "optim.base_lr": 1e-9}
    changes |= {"data.labels_per_class": None}
    for start, ended in ((0.0, 6), (0.5, 16)):  # the best score is that of step 2, and from the start on that of 12
        mpp.finetune(recipe(shards, tmp_path / str(start), shards, **changes, **{"unlabeled.start": start}))
        log = (tmp_path / str(start) / "scratch-seed0" / "train.log").read_text()
        assert ("unlabeled images from step 13 on" in log) == bool(start)
        assert f" of {ended}: best on" in log


def test_what_does_not_go_with_them(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unlabeled: learns from a moving average of the weights; give ema_decay"):
        recipe(shards, tmp_path, shards, ema_decay=None)
    with pytest.raises(UserError, match="unlabeled: cannot be combined with distill"):
        recipe(shards, tmp_path, shards, **{"distill.teacher": "runs/x"})
    with pytest.raises(UserError, match="unlabeled: not with task: segment"):
        recipe(shards, tmp_path, shards, task="segment", **{"data.labels_per_class": None})
    labels = {"task": "multilabel", "data.labels_per_class": None}
    with pytest.raises(UserError, match="unlabeled: kind: mixmatch: only with task: classify; use fixmatch"):
        recipe(shards, tmp_path, shards, **labels, **{"unlabeled.kind": "mixmatch"})
    with pytest.raises(UserError, match="unlabeled: start: at most 1 - warmup"):
        recipe(shards, tmp_path, shards, **{"unlabeled.start": 0.8, "unlabeled.warmup": 0.3})
    for changes in ({"balance": "loss"}, {"task.label_smoothing": 0.1}):
        with pytest.raises(UserError, match="mixmatch: not with balance: loss or task.label_smoothing"):
            recipe(shards, tmp_path, shards, **changes, **{"unlabeled.kind": "mixmatch"})
    with pytest.raises(UserError, match=r"unlabeled\.images"):
        mpp.finetune(recipe(shards, tmp_path / "run", tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"unlabeled\.auto_augment: timm has no policy 'strange'"):
        mpp.finetune(recipe(shards, tmp_path / "run", shards, **{"unlabeled.auto_augment": "strange"}))
    assert not (tmp_path / "run").exists()


def test_images_of_which_none_can_be_read_are_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"unlabeled\.images: not one of 3 images looked at can be read; the first: .*\.jpg"
    ):
        mpp.finetune(recipe(shards, tmp_path / "run", tmp_path / "images"))
    assert not (tmp_path / "run").exists()


def test_they_can_be_read_by_workers_that_are_spawned(shards: Path, tmp_path: Path) -> None:
    import pickle

    images = dataset(recipe(shards, tmp_path, shards))
    images.labeled.augment = None  # type: ignore[attr-defined]  # timm's, which is not ours to pickle
    images.unlabeled.strong = len  # type: ignore[assignment]
    again = pickle.loads(pickle.dumps(images))
    assert again.order.at(0, 0, 9) == images.order.at(0, 0, 9)


def test_a_bad_image_is_replaced_and_named(shards: Path, image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    broken = sorted(folder.rglob("*.*"))[::2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:20])
    made = recipe(shards, tmp_path / "run", folder, **{"data.max_bad_fraction": 1.0})
    mpp.finetune(made)
    log = (tmp_path / "run" / "scratch-seed0" / "train.log").read_text()
    assert sum(path.name in log for path in broken) > 10
    assert "unreadable images so far" in log


def test_a_teacher_teaches_from_them(shards: Path, tmp_path: Path) -> None:
    """With alpha 1, the student learns from the teacher only and not from labels. Killed and resumed, the run is the
    same.
    """
    mpp.finetune(recipe(shards, tmp_path / "teacher", shards, unlabeled=None))
    teacher = str(tmp_path / "teacher" / "scratch-seed0")
    distill = {"teacher": teacher, "kind": "soft", "alpha": 1.0, "images": str(shards), "per_label": 2}
    changes: dict[str, Any] = {"unlabeled": None, "optim.steps": 8, "checkpoint_every_steps": 3, "keep_checkpoints": 9}
    with pytest.warns(MppWarning, match="learned from the labels that seed 0 draws; seed 1 draws others"):
        mpp.finetune(recipe(shards, tmp_path / "other", shards, unlabeled=None, distill=distill, seeds=[1]))
    losses = {}
    for name, images in (("with", str(shards)), ("without", None)):
        made = recipe(shards, tmp_path / name, shards, distill=distill | {"images": images}, **changes)
        mpp.finetune(made)
        losses[name] = [m["loss"].hex() for m in read_metrics(tmp_path / name / "scratch-seed0")]
    assert losses["with"] != losses["without"]
    told = json.loads((tmp_path / "with" / "data.json").read_text())["unlabeled"]
    assert told == {"images": 35, "left_out": 25}
    trial = tmp_path / "with" / "scratch-seed0"
    (trial / "result.json").unlink()
    for step in (6, 8):
        shutil.rmtree(trial / "checkpoints" / f"step-{step:08d}")
    made = recipe(shards, tmp_path / "with", shards, distill=distill, **changes)
    mpp.finetune(made, resume="auto")
    assert [m["loss"].hex() for m in read_metrics(trial)] == losses["with"]


def test_unlabeled_images_of_a_teacher_are_mixed_like_labeled_ones(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher and the student see the same mixed images."""
    mpp.finetune(recipe(shards, tmp_path / "teacher", shards, unlabeled=None, **{"optim.steps": 1}))
    seen: list[Tensor] = []
    loss = Distillation.loss

    def watched(self: Distillation, logits: Any, x: Tensor, labels: Tensor, task_loss: Any) -> Tensor:
        seen.append(x)
        return loss(self, logits, x, labels, task_loss)

    monkeypatch.setattr(Distillation, "loss", watched)
    distill = {"teacher": str(tmp_path / "teacher" / "scratch-seed0"), "images": str(shards), "per_label": 2}
    changes: dict[str, Any] = {"unlabeled": None, "distill": distill, "optim.steps": 1}
    for mixup in (0.0, 0.8):
        mpp.finetune(recipe(shards, tmp_path / str(mixup), shards, mixup=mixup, **changes))
    alone, mixed = (x[len(x) // 3 :] for x in seen)  # one labeled image to two without labels
    difference = alone - alone.flip(0)
    share = ((mixed - alone.flip(0)) * difference).sum() / difference.square().sum()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(mixed, share * alone + (1 - share) * alone.flip(0), rtol=0, atol=1e-4)
