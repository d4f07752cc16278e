"""Combinations of masks, corruptions, targets, losses and heads, built from recipes: they work or are refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mpp.encoders.cells import EncoderOutput, patchify, unpatchify
from mpp.errors import UserError
from mpp.objective import contract
from mpp.objective.build import build_mask, build_model
from mpp.objective.contract import shaken
from mpp.objective.mask_drawing import draw_masks
from mpp.objective.model import MaskedPatchModel
from mpp.pretraining.measure import measure_collapse, warn_of_poor_targets
from mpp.recipe import registry
from mpp.recipe.loading import checked
from tests.conftest import drawn_image, pretrain_recipe

TINY_VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
TEACHER = {"teacher": "vit_tiny_patch16_224", "pretrained": False, "args": TINY_VIT}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"encoder.args": TINY_VIT, "data.image_size": (12, 20)},
    "swin": {
        "encoder.name": "swin_tiny_patch4_window7_224",
        "encoder.args": {"patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
        "data.image_size": (12, 20),
    },
}
NEEDS = {"teacher": {f"target.{k}": v for k, v in TEACHER.items()}}
"""Arguments that keep a target from downloading something."""


def model_of(**changes: Any) -> MaskedPatchModel:
    return build_model(pretrain_recipe("none", "none", **changes))[0]


def photos(size: tuple[int, int], number: int = 8) -> torch.Tensor:
    arrays = [np.asarray(drawn_image(i, 32))[: size[0], : size[1]] for i in range(number)]
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1).contiguous()


def batch_of(model: MaskedPatchModel, recipe: Any, number: int = 8) -> tuple[Any, ...]:
    size, unit = model.encoder.image_size, model.unit_px
    units = draw_masks(build_mask(recipe), (size[0] // unit, size[1] // unit), 0.5, 0, range(number))
    return photos(size, number), units


def works(corruption: str, head: str, encoder: str, unit_px: int) -> bool:
    c, h = registry.component("corruption", corruption), registry.component("head", head)
    if c.mechanism == "drop":
        return encoder == "vit" and unit_px >= 4 and not h.needs_hidden_tokens
    if c.mechanism == "token" and encoder == "vit" and unit_px < 4:
        return False
    return unit_px >= 4 or h.needs_hidden_tokens


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("unit_px", [2, 4])
@pytest.mark.parametrize(
    ("corruption", "head"), list(itertools.product(registry.names("corruption"), registry.names("head")))
)
def test_no_composition_leaks(corruption: str, head: str, encoder: str, unit_px: int) -> None:
    """Combinations that cannot work are refused in one line, before any data is read."""
    changes = {
        **ENCODERS[encoder], "corruption.name": corruption, "head.name": head, "mask.unit_px": unit_px,
        "predict_fraction": 0.6,
    }  # fmt: skip
    if not works(corruption, head, encoder, unit_px):
        with pytest.raises(UserError, match=r"^(corruption|head|mask)[a-z_.]*: .*") as error:
            model_of(**changes)
        assert "\n" not in str(error.value)
        return
    model = shaken(model_of(**changes))
    for training in (False, True):
        contract.no_leak(model, training=training)


@pytest.mark.parametrize("mask", registry.names("mask"))
@pytest.mark.parametrize("unit_px", [4, 8])
def test_every_mask_goes_with_every_way_of_hiding(mask: str, unit_px: int) -> None:
    changes: dict[str, Any] = {"data.image_size": (16, 24), "mask.name": mask, "mask.unit_px": unit_px}
    if mask == "attention":
        changes |= {f"mask.{k}": v for k, v in {**TEACHER, "args": {**TINY_VIT, "patch_size": 4}}.items()}
    for corruption, head in (("token", "linear"), ("drop", "transformer"), ("bert", "mlp")):
        recipe = pretrain_recipe("none", "none", **changes, **{"corruption.name": corruption, "head.name": head})
        model = build_model(recipe)[0]
        contract.no_leak(shaken(model), training=True)
        raw, units = batch_of(model, recipe)
        layout = model.layout(model.images(raw), units)
        assert layout.units.hidden.flatten(1).sum(1).tolist() == [units.count] * len(raw)
        assert (layout.cells.hidden.flatten(1).sum(1) == units.count * (unit_px // 4) ** 2).all()


@pytest.mark.parametrize("target", registry.names("target"))
@pytest.mark.parametrize("loss", registry.names("loss"))
def test_every_target_with_every_loss_learns_or_is_refused(target: str, loss: str) -> None:
    changes = {**NEEDS.get(target, {}), "target.name": target, "loss.name": loss}
    of = registry.component("target", target).of
    if registry.component("loss", loss).of != of:
        with pytest.raises(UserError, match=f"loss: {loss} is not for {of}, which target {target} has; use one of"):
            pretrain_recipe("none", "none", **changes)
        return
    recipe = pretrain_recipe("none", "none", **changes)
    model = build_model(recipe)[0]
    batch = batch_of(model, recipe)
    found = contract.learn(model, batch)
    assert found[-1] < 0.9 * found[0]
    own, trivial = model.eval().losses_for_skill(*batch)
    assert own.shape == trivial.shape == (1,)
    assert torch.isfinite(own + trivial).all()


@pytest.mark.parametrize("mask", ["complementary", "attention"])
@pytest.mark.parametrize("target", registry.names("target"))
def test_several_masks_of_an_image_give_the_mean_of_their_losses(target: str, mask: str) -> None:
    """The target is computed once for each image."""
    changes: dict[str, Any] = {**NEEDS.get(target, {}), "target.name": target, "mask.name": mask, "masks_per_image": 3}
    if mask == "attention":
        changes |= {f"mask.{k}": v for k, v in TEACHER.items()}
    recipe = pretrain_recipe("none", "none", **changes, **{"corruption.name": "drop", "head.name": "transformer"})
    model = build_model(recipe)[0].eval()
    size = model.encoder.image_size
    units = draw_masks(build_mask(recipe), (size[0] // 4, size[1] // 4), 0.5, 0, range(4), recipe.masks_per_image)
    assert len(units.hidden) == 12
    raw = photos(size, 4)
    seen: list[int] = []
    original = model.objectives[0].target.at
    model.objectives[0].target.at = lambda images, cells: seen.append(len(images.raw)) or original(images, cells)
    together = model(raw, units)
    assert seen == [4]
    alone = torch.stack([model(raw, units.of(slice(mask, None, 3))) for mask in range(3)])
    assert len(alone.detach().unique()) == 3
    torch.testing.assert_close(together, alone.mean(0))


def test_batch_norms_allow_one_mask_per_image() -> None:
    """The statistics would carry pixels from one mask to another."""
    with pytest.raises(UserError, match="masks_per_image: ResNet has batch norms, .*; use 1"):
        model_of(
            **{"encoder.name": "resnet18d", "encoder.args": {"channels": [8, 8, 8, 8]}, "corruption.name": "zeros"},
            **{"mask.unit_px": 16, "data.image_size": 64, "masks_per_image": 2, "head.name": "mlp"},
        )


@pytest.mark.parametrize("target", registry.names("target"))
def test_the_loss_where_none_is_named(target: str) -> None:
    recipe = pretrain_recipe("none", "none", **NEEDS.get(target, {}), **{"target.name": target})
    of = registry.declaration("target", target).constants["of"]
    assert recipe.loss.name == {"values": "mse", "classes": "cross_entropy", "probabilities": "kl"}[of]


@pytest.mark.parametrize(("encoder", "unit_px"), [("vit", 4), ("vit", 8), ("swin", 2), ("swin", 4), ("swin", 8)])
def test_every_prediction_lands_on_its_cell(encoder: str, unit_px: int) -> None:
    """A head that returns the true values has no loss, for any ratio of mask units to encoder cells."""
    changes = {**ENCODERS[encoder], "data.image_size": (16, 24), "target.name": "pixels", "mask.unit_px": unit_px}
    recipe = pretrain_recipe("none", "none", **changes, predict_fraction=0.5)
    model = build_model(recipe)[0]
    raw, units = batch_of(model, recipe)
    images = model.images(raw)
    layout = model.layout(images, units)
    assert model.objectives[0].target.cell_px == min(unit_px, 4)
    assert (layout.cells.hidden.flatten(1).gather(1, layout.cells.predicted)).all()
    assert layout.cells.predicted.shape[1] == round(0.5 * units.count) * max(unit_px // 4, 1) ** 2

    class Knows(torch.nn.Module):
        needs_hidden_tokens, reads_visible = True, True

        def forward(self, features: EncoderOutput) -> torch.Tensor:
            fine = unpatchify(model.objectives[0].target(images), 1, layout.cells.grid)
            coarse = patchify(fine, model.encoder.stride // model.cell_px)
            return coarse.gather(1, features.cells.predicted.unsqueeze(-1).expand(-1, -1, coarse.shape[-1]))

    model.objectives[0].head = Knows()
    assert float(model(raw, units)) == 0.0


class TestSeveralTargets:
    EXTRA = (
        {"target": {"name": "mean_color"}, "weight": 0.5},
        {"target": "pixels", "loss": "l1", "head": "mlp", "weight": 2.0},
    )

    def recipe(self) -> Any:
        return pretrain_recipe("none", "none", **{"extra_targets": list(self.EXTRA), "corruption.name": "bert"})

    def test_they_share_a_forward_and_keep_their_losses(self) -> None:
        recipe = self.recipe()
        model = build_model(recipe)[0]
        batch = batch_of(model, recipe)
        calls = []
        model.encoder.register_forward_hook(lambda *a: calls.append(1))
        losses = model(*batch)
        assert len(calls) == 1
        assert [o.name for o in model.objectives] == ["norm_pixels", "mean_color", "pixels"]
        assert model.weights.tolist() == [1.0, 0.5, 2.0]
        assert [type(o.loss).__name__ for o in model.objectives] == ["MseLoss", "CrossEntropyLoss", "L1Loss"]
        torch.testing.assert_close(losses[1], torch.tensor(np.log(512), dtype=torch.float32), atol=0.5, rtol=0)
        (losses * model.weights).sum().backward()
        assert all(o.head.out.weight.grad.abs().sum() > 0 for o in model.objectives[:2])

    def test_the_first_is_initialised_as_if_it_were_alone(self) -> None:
        alone = model_of(**{"corruption.name": "bert"})
        together = build_model(self.recipe())[0]
        for a, b in ((alone.encoder, together.encoder), (alone.objectives[0], together.objectives[0])):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.equal(p, q)

    def test_what_is_wrong_with_one_is_said_with_its_place(self) -> None:
        for extra, message in (
            ({"target": "pixels", "loss": "cross_entropy"}, r"extra_targets.0.loss: cross_entropy is not for values"),
            ({"target": "pixls"}, r"extra_targets.0.target.name: no such choice; got 'pixls'. Did you mean 'pixels'?"),
            ({"target": "pixels", "wieght": 2}, r"extra_targets.0.wieght: unknown key. Did you mean"),
            ({"target": {"name": "hog", "orientations": 1}}, r"extra_targets.0.target.orientations: must be >= 2"),
            ({"target": "pixels", "weight": 0}, r"extra_targets.0.weight: must be > 0"),
        ):
            with pytest.raises(UserError, match=message):
                pretrain_recipe("none", "none", extra_targets=[extra])
        with pytest.raises(UserError, match="extra_targets.0.head: dim must be a multiple"):
            model_of(extra_targets=[{"target": "pixels", "head": {"name": "transformer", "dim": 30}}])
        for extra, message in (
            ({"target": "pixels"}, "extra_targets.0.head.name: this head reads"),
            (
                {"target": {"name": "teacher", "teacher": "none"}, "head": "transformer"},
                "extra_targets.0.target.teacher: timm .* has no model 'none'",
            ),
        ):
            with pytest.raises(UserError, match=message):
                model_of(**{"corruption.name": "drop", "head.name": "transformer", "extra_targets": [extra]})

    def test_one_of_them_is_changed_by_its_number(self) -> None:
        extra = [dict(e) for e in self.EXTRA]
        recipe = pretrain_recipe("none", "none", extra_targets=extra)
        changed = checked(recipe, type(recipe), {"extra_targets.1.weight": 3, "extra_targets.0.target.bits": 2})
        assert (changed.extra_targets[1].weight, changed.extra_targets[0].target.bits) == (3.0, 2)
        with pytest.raises(UserError, match="command line: extra_targets.2.weight: '2': the list has items 0 to 1"):
            checked(recipe, type(recipe), {"extra_targets.2.weight": 3})
        with pytest.raises(UserError, match="command line: extra_targets.0.weight: must be > 0; got -1"):
            checked(recipe, type(recipe), {"extra_targets.0.weight": -1})


def test_images_of_one_colour_are_doubted() -> None:
    model = model_of(**{"target.name": "mean_color"})
    (line,) = warn_of_poor_targets(model, torch.full((8, 3, 16, 16), 200, dtype=torch.uint8))
    assert "mean_color: its classes carry 0.00 bits" in line
    assert warn_of_poor_targets(model, torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)) == []


def test_the_rank_of_targets_that_may_collapse() -> None:
    model = model_of(**{"target.name": "ema_teacher"})
    rank, share = measure_collapse(model, photos((16, 16)))["ema_teacher"]
    assert rank > 2
    assert share > 0.1
    with torch.no_grad():
        for p in model.objectives[0].target.parameters():
            p.zero_()
        model.objectives[0].target.teacher.model.blocks[-1].mlp.fc2.bias.copy_(torch.arange(32.0))
    rank, share = measure_collapse(model, photos((16, 16)))["ema_teacher"]
    assert (rank, share) == pytest.approx((1, 0), abs=1e-3)
    assert measure_collapse(model_of(), photos((16, 16))) == {}
