"""Distillation: the loss by hand, the teacher's own preprocessing, what a student learns from it, wrong teachers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import mpp
from mpp.errors import UserError
from mpp.finetuning.distillation import Distillation
from mpp.finetuning.model import build
from tests.finetuning.test_finetuning import ARGS, recipe

DEIT = {"name": "deit_tiny_distilled_patch16_224", "args": {**ARGS, "depth": 1}}
CONVNET = {"name": "resnet10t", "args": {}}


class Teacher(torch.nn.Module):
    """A teacher whose logits depend on the brightness of the image. It keeps the images that it gets."""

    def __init__(self, size: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, size, size), "mean": mean, "std": std}
        self.linear = torch.nn.Linear(1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return self.linear(x.mean((1, 2, 3)).unsqueeze(1))


def distillation(kind: str, teacher: torch.nn.Module, alpha: float = 0.3, temperature: float = 2.0) -> Distillation:
    half = torch.full((3, 1, 1), 0.5)
    return Distillation([teacher], kind=kind, alpha=alpha, temperature=temperature, mean=half, std=half)  # type: ignore[arg-type]


def test_the_teacher_sees_the_same_pixels_in_its_own_way() -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    teacher = Teacher(16, mean, std)
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    distillation("hard", teacher).teach((pixels - 0.5) / 0.5)
    wanted = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    wanted = (wanted - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(teacher.seen, wanted)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_the_teacher_runs_in_the_precision_of_the_run() -> None:
    from functools import partial

    seen: list[bool] = []

    class Watching(Teacher):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    half = torch.full((3, 1, 1), 0.5)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    found = Distillation(
        [Watching(8, [0.5] * 3, [0.5] * 3)],
        kind="soft",
        alpha=0.5,
        temperature=1.0,
        mean=half,
        std=half,
        autocast=autocast,
    )
    assert found.teach(torch.zeros(1, 3, 8, 8)).dtype == torch.float32
    assert seen == [True]


def test_without_a_teacher_both_tokens_have_the_same_head(shards: Path, tmp_path: Path) -> None:
    """The mean of both tokens goes through one layer, so the mean over two heads that are equal is the same."""
    mpp.finetune(
        recipe(shards, tmp_path / "o", "scratch", architecture=DEIT, pool="token", seeds=[0], **{"optim.steps": 3})
    )
    trial = tmp_path / "o" / "scratch-seed0"
    rows, _, _ = mpp.predict(trial, [_drawn(tmp_path)])
    assert 0.5 <= rows[0]["probability"] <= 1
    model = timm.create_model(f"local-dir:{trial / 'encoder'}", pretrained=True).eval()
    assert torch.equal(model.head.weight, model.head_dist.weight)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.head(model.forward_head(model.forward_features(x), pre_logits=True)))


def _drawn(folder: Path) -> str:
    from tests.conftest import drawn_image, encoded

    (folder / "one.png").write_bytes(encoded(drawn_image(1)))
    return str(folder / "one.png")


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("two_heads", [False, True])
def test_the_loss_by_hand(kind: str, two_heads: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(4, 3, 8, 8, generator=rng), torch.tensor([0, 1, 2, 0])
    first, second = torch.randn(2, 4, 3, generator=rng)
    teacher = Teacher(8, [0.5] * 3, [0.5] * 3)
    found = distillation(kind, teacher).loss((first, second) if two_heads else first, x, labels, F.cross_entropy)
    taught = teacher(x).detach()
    learner = second if two_heads else first
    if kind == "hard":
        theirs = F.cross_entropy(learner, taught.argmax(-1))
    else:
        p, q = (taught / 2).softmax(-1), (learner / 2).softmax(-1)
        theirs = 4 * (p * (p.log() - q.log())).sum(-1).mean()  # DeiT, equation 2: τ² KL
    torch.testing.assert_close(found, 0.7 * F.cross_entropy(first, labels) + 0.3 * theirs)


def test_of_several_teachers_the_mean_probability_is_learned() -> None:
    """Each of them sees the images at its own size."""
    torch.manual_seed(0)
    teachers = [Teacher(8, [0.5] * 3, [0.5] * 3), Teacher(16, [0.4] * 3, [0.2] * 3)]
    x = torch.randn(4, 3, 8, 8)
    half = torch.full((3, 1, 1), 0.5)
    found = Distillation(teachers, kind="soft", alpha=0.5, temperature=1.0, mean=half, std=half).teach(x)
    alone = [distillation("soft", teacher).teach(x).softmax(-1) for teacher in teachers]
    torch.testing.assert_close(found.softmax(-1), (alone[0] + alone[1]) / 2)
    assert [teacher.seen.shape[-1] for teacher in teachers] == [8, 16]
    for teacher in teachers:
        teacher.linear.weight.data *= 1e4  # so sure that the probabilities of other classes are rounded to zero
    sure = Distillation(teachers, kind="soft", alpha=0.5, temperature=1.0, mean=half, std=half)
    assert sure.loss(torch.randn(4, 3), x, torch.tensor([0, 1, 2, 0]), F.cross_entropy).isfinite()


def test_a_run_with_two_teachers(shards: Path, run: Path, teacher: Path, tmp_path: Path) -> None:
    second = renamed(teacher, tmp_path / "second", ["disc", "square"])
    both = {"distill": {"teacher": [str(teacher), str(second)], "kind": "soft"}, "seeds": [0], "optim.steps": 2}
    mpp.finetune(recipe(shards, tmp_path / "ft", run, **both, beside=[]))
    wrong = renamed(teacher, tmp_path / "wrong", ["disc", "ring"])
    both["distill"] = {"teacher": [str(teacher), str(wrong)]}
    with pytest.raises(UserError, match=r"distill\.teacher: .*wrong: class 1 is 'ring', but 'square'"):
        mpp.finetune(recipe(shards, tmp_path / "other", run, **both))


@pytest.fixture(scope="module")
def teacher(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a convolutional network as teacher."""
    out = tmp_path_factory.mktemp("teacher") / "ft"
    changes = {"architecture": CONVNET, "data.image_size": 32, "seeds": [0], "optim.steps": 10}
    mpp.finetune(recipe(shards, out, "scratch", **changes))
    return out / "scratch-seed0"


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_student_agrees_with_its_teacher(kind: str, shards: Path, teacher: Path, tmp_path: Path) -> None:
    """With alpha 1, the student learns only what the teacher predicts, right or wrong."""
    from mpp.data.labeled import open_labeled
    from mpp.data.labeled_sets import CentreDataset

    changes = {
        "architecture": DEIT, "pool": "token", "seeds": [0], "optim.steps": 60, "data.crop_scale": [0.99, 1.0],
        "data.crop_ratio": [0.99, 1.01], "data.flip": 0.0, "distill": {"teacher": str(teacher), "kind": kind, "alpha": 1.0},
    }  # fmt: skip
    mpp.finetune(recipe(shards, tmp_path / "ft", "scratch", **changes))
    student = timm.create_model(f"local-dir:{tmp_path / 'ft/scratch-seed0/encoder'}", pretrained=True).eval()
    data = open_labeled(
        tuple(str(shards / f"shard-{i:06d}.tar") for i in (1, 2)), key="k", classes=None, cache_dir=None,
        cache_limit_bytes=1e9,
    )  # fmt: skip
    reading: Any = {"channels": 3, "formats": ("JPEG", "PNG"), "max_image_pixels": 10**6}
    images = CentreDataset(data, (16, 16), 1.0, **reading).__getitems__(list(range(35))).images  # type: ignore[union-attr]
    x = (images.float() / 255 - 0.5) / 0.5
    own = mpp.load_encoder(teacher).eval()
    with torch.no_grad():
        said = own(F.interpolate(x, (32, 32), mode="bicubic", antialias=True, align_corners=False)).argmax(-1)
        tokens = student.forward_features(x)
        learned = student.head_dist(tokens[:, 1]).argmax(-1)
    assert (learned == said).float().mean() > 0.7


def test_a_distilled_model_is_exported_with_both_heads(shards: Path, teacher: Path, tmp_path: Path) -> None:
    changes = {
        "architecture": DEIT, "pool": "token", "seeds": [0], "optim.steps": 3, "distill.teacher": str(teacher),
    }  # fmt: skip
    result = mpp.finetune(recipe(shards, tmp_path / "ft", "scratch", **changes))
    trial = tmp_path / "ft" / "scratch-seed0"
    mpp.verify(trial)
    model = timm.create_model(f"local-dir:{trial / 'encoder'}", pretrained=True).eval()
    assert [layer.out_features for layer in model.get_classifier()] == [2, 2]
    assert not torch.equal(model.head.weight, model.head_dist.weight)
    again = mpp.finetune(recipe(shards, tmp_path / "ft", "scratch", **changes), resume="auto")
    assert again.score == result.score


def test_killed_and_resumed_it_is_the_same(shards: Path, run: Path, teacher: Path, tmp_path: Path) -> None:
    changes = {"seeds": [0], "optim.steps": 14, "distill": {"teacher": str(teacher), "kind": "soft", "alpha": 0.5}}
    mpp.finetune(recipe(shards, tmp_path / "whole", run, **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for approach in ("pretrained", "scratch"):
        trial = tmp_path / "cut" / f"{approach}-seed0"
        (trial / "result.json").unlink()
        shutil.rmtree(trial / "checkpoints" / "step-00000014")
    mpp.finetune(recipe(shards, tmp_path / "cut", run, **changes), resume="auto")
    for approach in ("pretrained", "scratch"):
        a, b = (
            [json.loads(line)["loss"] for line in (tmp_path / n / f"{approach}-seed0" / "metrics.jsonl").open()]
            for n in ("whole", "cut")
        )
        assert a == b


def test_measuring_on_the_way_leaves_two_heads(shards: Path, teacher: Path, tmp_path: Path) -> None:
    """In eval mode, the model returns one mean of both heads. Measuring for early stopping must not leave it in this
    mode.
    """
    losses = []
    for every in (2, 8):
        out = tmp_path / str(every)
        changes = {
            "architecture": DEIT, "pool": "token", "seeds": [0], "optim.steps": 8, "distill.teacher": str(teacher),
            "early_stop": {"every_steps": every, "patience": 9},
        }  # fmt: skip
        mpp.finetune(recipe(shards, out, "scratch", **changes))
        losses.append([json.loads(line)["loss"] for line in (out / "scratch-seed0" / "metrics.jsonl").open()])
    assert losses[0] == losses[1]


def test_only_a_student_with_the_token_has_a_second_head(shards: Path, run: Path, teacher: Path) -> None:
    with_teacher = {"distill.teacher": str(teacher)}
    assert build(recipe(shards, "o", run, **with_teacher), "pretrained", 0, 2).distilled is None
    deit = {"architecture": DEIT, "pool": "token"}
    assert build(recipe(shards, "o", "scratch", **deit), "scratch", 0, 2).distilled is None
    assert build(recipe(shards, "o", "scratch", **deit, **with_teacher), "scratch", 0, 2).distilled is not None


def renamed(trial: Path, out: Path, names: list[str]) -> Path:
    shutil.copytree(trial, out)
    config = out / "encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "label_names": names}))
    return out


@pytest.mark.filterwarnings("ignore:data.channels. 1, but the encoder:mpp.errors.MppWarning")
def test_wrong_teachers(shards: Path, run: Path, teacher: Path, tmp_path: Path) -> None:
    other = renamed(teacher, tmp_path / "other", ["disc", "ring"])
    for source, changes, message in [
        ("nowhere", {}, r"distill\.teacher: 'nowhere': no such folder, and no such model of timm"),
        (run, {}, r"distill\.teacher: .*run has no classifier; give a fine-tuned model"),
        (other, {}, r"class 1 is 'ring', but 'square' in the training data"),
        (teacher, {"data.channels": 1}, r"distill\.teacher: .* reads 3 channels; data\.channels is 1"),
        (teacher, {"distill.alpha": 1.5}, r"distill\.alpha: must be >= 0 and <= 1; got 1.5"),
        (teacher, {"distill.kind": "warm"}, r"distill\.kind: no such choice; got 'warm'.* Choose from hard, soft"),
    ]:
        with pytest.raises(UserError, match=message):
            mpp.finetune(recipe(shards, tmp_path / "ft", run, **{"distill.teacher": str(source), **changes}))
        assert not (tmp_path / "ft").exists()

    with pytest.raises(UserError, match=r"class 1 is 'ring', but 'square' in the training data"):
        mpp.finetune(
            recipe(
                shards, tmp_path / "ft", "scratch", architecture=DEIT, pool="token", **{"distill.teacher": str(other)}
            )
        )
    assert not (tmp_path / "ft").exists(), "an encoder from scratch has a teacher that is checked as well"
