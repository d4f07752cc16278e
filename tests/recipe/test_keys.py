"""Every recipe key has a text, and for common slips the intended key is suggested."""

from __future__ import annotations

import pytest

from mpp.errors import UserError
from mpp.recipe.keys import find_keys, keys_of
from mpp.recipe.loading import RECIPES, bundled, load_recipe
from mpp.recipe.overrides import parse_overrides


@pytest.mark.parametrize("job", RECIPES)
def test_every_key_has_a_text(job: str) -> None:
    keys = keys_of(RECIPES[job])
    assert len(keys) > 30
    for key in keys:
        assert key.text.endswith((".", "].", ")")), f"{key.name}: {key.text!r}"
        first = key.text.split()[0].rstrip(":,")
        assert first[0].isupper() or first in (*key.allowed.split(", "), "timm", "timm's"), key.name


def test_a_key_is_found_by_name_pattern_and_part() -> None:
    job = RECIPES["pretrain"]
    assert {key.component for key in find_keys(job, "mask.ratio")} == {
        "attention",
        "block",
        "complementary",
        "inverse_block",
        "noise",
        "uniform",
    }
    assert [key.default for key in find_keys(job, "optim.base_lr")] == ["0.00015"]
    assert {key.name for key in find_keys(job, "optim.*_lr")} == {"optim.base_lr", "optim.min_lr"}
    assert {key.name for key in find_keys(job, "warmup")} == {"optim.warmup_epochs", "optim.warmup_steps"}
    assert [key.default for key in find_keys(job, "data.shards")] == ["required"]
    probe = {key.name: key.default for key in find_keys(job, "probe")}
    assert (probe["probe"], probe["probe.train"]) == ("null", "required"), "a recipe may lack this section"


SLIPS = {
    "pretrain": {
        "lr=1": "optim.base_lr", "optim.lr=1": "optim.base_lr", "batch_size=8": "optim.global_batch_size",
        "data.batch_size=8": "optim.global_batch_size", "epochs=3": "optim.epochs", "steps=3": "optim.steps",
        "data=photos": "data.shards=photos", "model=vit": "encoder.name", "encoder=vit": "encoder.name=vit",
        "image_size=32": "data.image_size", "data.img_size=32": "data.image_size", "mask_ratio=0.5": "mask.ratio",
        "patch_size=4": "encoder.args.patch_size", "encoder.depth=4": "encoder.args.depth", "seeds=[1]": "seed",
        "num_workers=2": "data.workers", "output_dir=x": "out",
    },
    "finetune": {
        "lr=1": "optim.base_lr", "model=vit": "encoder", "data=photos": "data.train=photos", "seed=3": "seeds",
        "labels=10": "data.labels_per_class", "embed_dim=4": "architecture.args.embed_dim", "baseline=cnn": "beside",
        "steps=3": "optim.steps", "cnn.lr=1": "cnn.base_lr", "scratch.lr=1": "scratch.base_lr", "cnn.model=a": "cnn.name",
    },
}  # fmt: skip


@pytest.mark.parametrize("job", SLIPS)
def test_slips_find_their_key(job: str) -> None:
    for slip, meant in SLIPS[job].items():
        with pytest.raises(UserError) as refused:
            load_recipe(bundled()[f"{job}/vit_small"], RECIPES[job], parse_overrides((slip,)))
        assert f"Did you mean '{meant}'?" in str(refused.value) or f"Did you mean {meant}?" in str(refused.value), slip


@pytest.mark.parametrize(
    ("slip", "line"),
    [
        ("head.depth=2", "It belongs to head=cross_attention and head=transformer. Known keys: name"),
        ("target.layers=2", "It belongs to target=clusters, target=ema_teacher and target=teacher. Known keys: name"),
        ("loss.beta=2", "It belongs to loss=smooth_l1. Known keys: name"),
        ("head.layers=2", "unknown key. Known keys: name"),
    ],
)
def test_keys_of_other_components_are_named_with_them(slip: str, line: str) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe(bundled()["pretrain/vit_small"], RECIPES["pretrain"], parse_overrides((slip, "data.shards=a")))
    assert line in str(refused.value)
