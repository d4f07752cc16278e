"""Agreement of views: SIGReg tells normal embeddings from others, and keeps training from a collapse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mpp
from mpp.encoders.cells import EncoderOutput
from mpp.errors import UserError
from mpp.inspection.replay import replay
from mpp.objective.agreement import Agreement
from mpp.objective.build import build_mask, build_model
from mpp.objective.mask_drawing import draw_masks
from tests.conftest import pretrain_recipe

RESNET: dict[str, Any] = {
    "encoder.name": "resnet18d",
    "encoder.args": {"channels": [8, 8, 8, 8]},
    "corruption.name": "zeros",
    "mask.unit_px": 16,
    "data.image_size": 64,
    "head.name": "mlp",
}
VIT: dict[str, Any] = {"corruption.name": "drop", "head.name": "transformer"}


def agreement_of(**changes: Any) -> Agreement:
    torch.manual_seed(0)
    return Agreement(6, **{"views": 2, "weight": 1.0, "dim": 6, "hidden_dim": 32, "sigreg_weight": 0.05, **changes})


def normal(count: int, seed: int = 1, views: int = 1) -> Tensor:
    return torch.randn(count, views, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [32, 512])
@pytest.mark.parametrize("likeness", [0.0, 0.9])
def test_sigreg_of_normal_embeddings_is_the_same_for_any_number_and_likeness(count: int, likeness: float) -> None:
    """The expected value is the integral of w(t) (1 - exp(-t²)), with w(t) = exp(-t²/2): 2.507 - 1.447 = 1.06."""
    sigreg, found = agreement_of().sigreg, []
    for seed in range(30):
        own, shared = normal(count, seed, views=3), normal(count, 100 + seed)
        found.append(float(sigreg((1 - likeness) ** 0.5 * own + likeness**0.5 * shared)))
    assert sum(found) / 30 == pytest.approx(1.06, rel=0.25)


@pytest.mark.parametrize(
    "change", [lambda x: 0 * x, lambda x: 0.3 * x, lambda x: 3 * x, lambda x: x + 1, lambda x: x[..., :1] + 0 * x]
)
def test_sigreg_sees_embeddings_that_are_not_normal(change: Any) -> None:
    sigreg = agreement_of().sigreg
    assert sigreg(change(normal(512))) > 5 * sigreg(normal(512))


def test_sigreg_of_equal_embeddings_is_that_of_the_formula() -> None:
    """The integral of exp(-t²/2) (1 - exp(-t²/2))²: 2.5066 - 2 · 1.7725 + 1.4472 = 0.409 for each embedding."""
    assert float(agreement_of().sigreg(torch.zeros(100, 2, 6))) == pytest.approx(40.9, rel=1e-3)


def test_views_that_are_equal_have_no_distance() -> None:
    agreement = agreement_of()
    features = normal(32)
    torch.manual_seed(0)
    both = agreement(features.repeat(1, 3, 1))
    torch.manual_seed(0)
    only = 0.05 * agreement.sigreg(agreement.projector(features))
    torch.testing.assert_close(both, only)


@pytest.mark.parametrize(("sigreg_weight", "collapses"), [(1e-6, True), (0.05, False)])
def test_sigreg_keeps_embeddings_apart(sigreg_weight: float, collapses: bool) -> None:
    agreement = agreement_of(sigreg_weight=sigreg_weight)
    optimizer = torch.optim.AdamW(agreement.parameters(), lr=1e-2, weight_decay=0.0)
    images = normal(128)
    for step in range(150):
        noise = torch.randn(128, 2, 6, generator=torch.Generator().manual_seed(step))
        loss = agreement(images + 0.5 * noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spread = float(agreement.projector(images).detach().std(0).mean())
    assert (spread < 0.1) is collapses


@pytest.mark.parametrize("encoder", [VIT, RESNET], ids=["vit", "resnet"])
def test_what_one_view_shows_does_not_reach_predictions_for_another(encoder: dict[str, Any]) -> None:
    """Batch norms in training mode would carry it, if all views were in one batch."""
    recipe = pretrain_recipe("none", "none", **encoder, agreement={"views": 2})
    model, grid = build_model(recipe)
    model.train()
    units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(8))
    raw = torch.rand(8, 3, *recipe.data.image_size, generator=torch.Generator().manual_seed(0)) * 255
    other = raw.clone()
    other[1::2] = 255 - other[1::2]
    seen: list[list[Tensor]] = []
    for images in (raw, other):
        losses: list[Tensor] = []
        subject = copy.deepcopy(model)
        original = subject._losses
        subject._losses = lambda p, t, losses=losses, original=original: losses.append(p[0]) or original(p, t)
        found = subject(images, units)
        assert found.shape == (2,)
        assert torch.isfinite(found).all()
        together = torch.cat(losses) if len(losses) > 1 else torch.cat([losses[0][::2], losses[0][1::2]])
        seen.append([together[:4], together[4:]])
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])


def test_in_bf16_the_loss_is_computed_in_float32() -> None:
    agreement, features = agreement_of(), normal(32, views=2)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = agreement(features)
        embeddings = agreement.projector(features).float()
        assert agreement.projector(features).dtype == torch.bfloat16
        assert agreement.sigreg(features).dtype == torch.bfloat16, "outside of forward, autocast holds"
    assert loss.dtype == torch.float32
    torch.manual_seed(0)
    distance = (embeddings - embeddings.mean(1, keepdim=True)).square().mean()
    torch.testing.assert_close(loss, 0.95 * distance + 0.05 * agreement.sigreg(embeddings), rtol=1e-6, atol=0)


def test_cells_that_are_hidden_as_a_whole_are_not_pooled() -> None:
    """If mask units are parts of an encoder's cell, cells that are visible in part are pooled."""
    recipe = pretrain_recipe("none", "none", **RESNET, agreement={"views": 2})
    model, grid = build_model(recipe)
    units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(2))
    units.hidden[:] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    layout = model.layout(model.images(torch.zeros(2, 3, 64, 64)), units)
    tokens = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 4, 1).expand(2, 4, 8)
    features = EncoderOutput(tokens, layout.encoder_cells, "raster")
    torch.testing.assert_close(model._pool(features, layout), torch.full((2, 8), (20 + 30 + 40) / 3))


def test_views_with_batch_norms_cannot_be_recomputed() -> None:
    changes = {"encoder.grad_checkpointing": True, "agreement": {"views": 2}}
    with pytest.raises(UserError, match="encoder.grad_checkpointing: ResNet has batch norms"):
        build_model(pretrain_recipe("none", "none", **RESNET, **changes))
    build_model(pretrain_recipe("none", "none", **VIT, **changes))


@pytest.mark.filterwarnings("ignore::mpp.errors.MppWarning")
@pytest.mark.parametrize("encoder", [VIT, {**RESNET, "data.held_out": 4}], ids=["vit", "resnet"])
def test_a_step_that_is_not_finite_is_repeated(encoder: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    changes = {"optim.base_lr": 1e30, "optim.warmup_steps": 0, "optim.steps": 5, "max_skipped_steps": 9}
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **encoder, **changes, agreement={"views": 4}))
    replayed = replay(tmp_path / "run")
    assert replayed.same
    assert "  each image by itself gives such a loss, so the weights are the likely cause" in replayed.lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks_per_image": 2}, "masks_per_image: cannot be combined with agreement, .*; use 1"),
        ({"agreement": {"views": 1}}, "agreement.views: .* 2"),
        ({"data.color_jitter": 0.4, "data.value_range": [0, 1]}, "data.color_jitter: for images of 8 bit"),
        ({"data.grayscale": 0.2, "data.channels": 5}, "data.grayscale: for images of 8 bit"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain_recipe("none", "none", **{"agreement": {"views": 2}, **changes})
