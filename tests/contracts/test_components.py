"""Contract tests that every mask, corruption, target, loss and head must pass, whichever files the folders contain."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.data.batch import NOISE, Images, Units
from mpp.encoders.adapter import adapt
from mpp.encoders.cells import Cells, EncoderOutput, gather_cells, patchify, repeat_cells, unpatchify
from mpp.encoders.creation import create_timm_model
from mpp.encoders.teacher import frozen_copy, frozen_teacher
from mpp.errors import UserError
from mpp.evaluation.rank import effective_rank, image_share
from mpp.objective.build import build_model
from mpp.objective.grid import hidden_cells, visible_cells
from mpp.objective.interfaces import CorruptionContext, TargetContext
from mpp.objective.mask_drawing import draw_masks
from mpp.recipe import registry
from mpp.rng import Purpose, stream
from tests.conftest import pretrain_recipe

GRID, CELL_PX = (3, 5), 4


def hidden_of(batch: int, grid: tuple[int, int] = GRID, count: int = 6) -> torch.Tensor:
    rows = [stream(0, Purpose.MASK, i).permutation(grid[0] * grid[1]) < count for i in range(batch)]
    return torch.from_numpy(np.stack(rows)).view(batch, *grid)


def noise_of(batch: int, grid: tuple[int, int] = GRID) -> torch.Tensor:
    return torch.rand(batch, len(NOISE), *grid, generator=torch.Generator().manual_seed(5))


def cells_of(batch: int, count: int = 6) -> Cells:
    hidden = hidden_of(batch, count=count)
    return Cells(hidden, visible_cells(hidden, count), hidden_cells(hidden, count))


def images_of(raw: torch.Tensor) -> Images:
    mean, std = torch.full((raw.shape[1], 1, 1), 0.45), torch.full((raw.shape[1], 1, 1), 0.25)
    return Images(raw, (raw.float() / 255 - mean) / std, mean, std)


def raw_of(channels: int, seed: int = 1) -> torch.Tensor:
    size = (4, channels, GRID[0] * CELL_PX, GRID[1] * CELL_PX)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def target_of(name: str, channels: int = 3, cell_px: int = CELL_PX, grid: tuple[int, int] = GRID, **args: Any) -> Any:
    """Build a target. By default its teachers are tiny and untrained, so that nothing is downloaded."""

    def teacher(**asked: Any) -> Any:
        return frozen_teacher(channels=channels, grid=grid, **asked)

    def student(**asked: Any) -> Any:
        size = (grid[0] * cell_px, grid[1] * cell_px)
        tiny = {"patch_size": cell_px, "embed_dim": 24, "depth": 2, "num_heads": 2}
        model = create_timm_model(
            "vit_tiny_patch16_224", image_size=size, in_chans=channels, pretrained=False, args=tiny
        )
        return frozen_copy(adapt(model, size), **asked)

    if channels == 13 and "bits" in registry.declaration("target", name).arguments:
        args = {"bits": 1, **args}
    if name == "teacher":
        vit = {"patch_size": cell_px, "embed_dim": 24, "depth": 2, "num_heads": 2}
        args = {"teacher": "vit_tiny_patch16_224", "pretrained": False, "args": vit, **args}
    return registry.component("target", name)(TargetContext(channels, cell_px, grid, teacher, student), **args)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_what_the_source_declares_is_what_the_class_has(kind: str) -> None:
    """Recipes are checked against a component's source, but runs use its class, so both must declare the same."""
    for name in registry.names(kind):
        cls, declared = registry.component(kind, name), registry.declaration(kind, name)
        assert declared.doc, f"{cls} has no docstring"
        assert declared.doc == (inspect.getdoc(cls) or "").partition(registry.ARGS)[0].strip()
        assert cls.__module__ == f"mpp.{registry.KINDS[kind].folder}.{name}".replace("/", ".")
        parameters = inspect.signature(cls, eval_str=True).parameters.values()
        keys = {p.name: (str(p.annotation), p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert {key: (str(a.annotation), a.default) for key, a in declared.arguments.items()} == {
            key: (annotation, registry.REQUIRED if default is inspect.Parameter.empty else default)
            for key, (annotation, default) in keys.items()
        }
        for key, value in declared.constants.items():
            assert getattr(cls, key) == value
        for key, argument in declared.arguments.items():
            assert argument.description.endswith("."), f"{cls}: {key} is not described"


@pytest.mark.parametrize("kind", registry.RECIPE_KEYS)
def test_each_component_names_its_source(kind: str) -> None:
    """A paper with its year, or "guess"."""
    for name in registry.names(kind):
        module = importlib.import_module(f"mpp.{registry.KINDS[kind].folder.replace('/', '.')}.{name}")
        texts = [module.__doc__, *(value.__doc__ for value in vars(module).values() if isinstance(value, type))]
        assert any(re.search(r"\b(19|20)\d\d\b|guess", text or "") for text in texts), f"{kind}: {name}"


def test_a_file_without_its_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mpp.objective.masks.uniform.UniformMask")
    with pytest.raises(UserError, match=r"masks/uniform\.py: class UniformMask is missing"):
        registry.component("mask", "uniform")
    monkeypatch.setattr("mpp.objective.masks.block.BlockMask", int)
    with pytest.raises(UserError, match=r"masks/block\.py: class BlockMask must derive from Mask"):
        registry.component("mask", "block")
    monkeypatch.delattr("mpp.objective.masks.grid.GridMask")
    with pytest.raises(UserError, match=r"mpp/objective/masks/grid\.py: class GridMask is missing"):
        registry.component("mask", "grid")


WRONG_FILES = {
    "class Other:\n    pass\n": r"class WrongMask is missing",
    "class WrongMask:\n    def __init__(self, *, ratio=0.5): ...\n": r"wrong\.py:2: ratio: a recipe key needs an annotation",
    "class WrongMask:\n    def __init__(self, *, ratio: Share): ...\n": r"wrong\.py:2: ratio: name 'Share' is not defined",
}


@pytest.mark.parametrize("source", WRONG_FILES)
def test_a_component_that_recipes_cannot_read_is_named(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mpp" / "objective" / "masks"
    folder.mkdir(parents=True)
    (folder / "wrong.py").write_text(source)
    monkeypatch.setattr(registry, "PACKAGE", tmp_path / "mpp")
    monkeypatch.setattr(registry, "names", lambda kind: ("wrong",))
    with pytest.raises(UserError, match=WRONG_FILES[source]):
        registry.declaration.__wrapped__("mask", "wrong")


def test_a_component_without_an_attribute_that_recipes_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mpp" / "objective" / "corruptions"
    folder.mkdir(parents=True)
    (folder / "wrong.py").write_text('class WrongCorruption:\n    mechanism = "pixel"\n')
    monkeypatch.setattr(registry, "PACKAGE", tmp_path / "mpp")
    monkeypatch.setattr(registry, "names", lambda kind: ("wrong",))
    message = r"wrong\.py: class WrongCorruption must set `hidden_enter` to a plain value"
    with pytest.raises(UserError, match=message):
        registry.declaration.__wrapped__("corruption", "wrong")


def test_a_mask_that_hides_another_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = registry.component("mask", "uniform")(ratio=0.5)
    monkeypatch.setattr(type(mask), "count", lambda self, grid, draw: 3)
    monkeypatch.setattr(type(mask), "__call__", lambda self, grid, count, rng: np.eye(4, dtype=bool))
    with pytest.raises(UserError, match="mask: UniformMask says it hides 3 units of 4×4, and hides 4; it must"):
        draw_masks(mask, (4, 4), 0.5, 0, [0, 1])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="uniform"):
        registry.component("mask", "unifrom")


def mask_of(name: str, ratio: Any) -> Any:
    cls = registry.component("mask", name)
    return cls(**({"ratio": ratio} if "ratio" in registry.declaration("mask", name).arguments else {}))


@pytest.mark.parametrize("name", registry.names("mask"))
@settings(max_examples=60, deadline=None)
@given(
    gh=st.integers(1, 9),
    gw=st.integers(2, 9),
    ends=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).map(sorted).map(tuple),
    draw=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**40),
)
def test_masks_hide_the_count_they_say(
    name: str, gh: int, gw: int, ends: tuple[float, float], draw: float, seed: int
) -> None:
    for ratio in (ends[0], ends):
        mask = mask_of(name, ratio)
        count = mask.count((gh, gw), draw)
        assert 1 <= count <= gh * gw - 1
        if hasattr(mask, "ratio"):
            wanted = ends[0] + (ends[1] - ends[0]) * draw if ratio == ends else ratio
            assert count == min(max(round(gh * gw * wanted), 1), gh * gw - 1)
        drawn = [mask((gh, gw), count, stream(seed, Purpose.MASK, i)) for i in range(3)]
        for m in drawn:
            assert m.shape == (gh, gw)
            assert m.dtype == bool
            assert m.sum() == count
        again = mask((gh, gw), count, stream(seed, Purpose.MASK, 0))
        assert (again == drawn[0]).all(), "a mask must be a pure function of its generator"


@pytest.mark.parametrize("name", registry.names("mask"))
def test_masks_differ_between_positions_and_reach_every_cell(name: str) -> None:
    mask = mask_of(name, 0.4)
    count = mask.count((6, 6), 0.5)
    drawn = np.stack([mask((6, 6), count, stream(0, Purpose.MASK, i)) for i in range(200)])
    possible = {
        "uniform": 200,
        "complementary": 200,
        "noise": 200,
        "attention": 200,
        "block": 150,
        "grid": 4,
        "inverse_block": 72,
    }.get(name, 2)
    assert len({m.tobytes() for m in drawn}) >= possible
    assert drawn.any(0).all()
    assert not drawn.all(0).any()


@pytest.mark.parametrize("name", registry.names("mask"))
def test_several_masks_of_a_sample_depend_on_its_position_alone(name: str) -> None:
    mask = mask_of(name, 0.75)
    several = draw_masks(mask, (6, 6), 0.5, 7, [3, 4, 900], masks_per_image=4)
    one_by_one = [draw_masks(mask, (6, 6), 0.5, 7, [position], masks_per_image=4) for position in (3, 4, 900)]
    assert torch.equal(several.hidden, torch.cat([units.hidden for units in one_by_one]))
    assert torch.equal(several.noise, torch.cat([units.noise for units in one_by_one]))
    assert len(several.noise.flatten(1).unique(dim=0)) == 12
    single = draw_masks(mask, (6, 6), 0.5, 7, [3, 4, 900])
    assert torch.equal(several.noise[::4], single.noise)
    assert torch.equal(several.hidden[::4], single.hidden), "the first mask is the one that a sample with one mask has"


@given(n=st.integers(2, 60), masks=st.integers(1, 9), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_complementary_masks_show_each_unit_equally_often(n: int, masks: int, ratio: float, seed: int) -> None:
    mask = mask_of("complementary", ratio)
    hidden = mask.draw_several((1, n), mask.count((1, n), 0.5), masks, stream(seed, Purpose.MASK))
    assert len(set(hidden.sum((1, 2)).tolist())) == 1
    shown = (~hidden).sum(0)
    assert shown.max() - shown.min() <= 1


def neighbours(visible: np.ndarray) -> int:
    """Count the pairs of adjacent visible units. The grid wraps around at its edges."""
    return int(sum((visible & np.roll(visible, 1, axis)).sum() for axis in (0, 1)))


def test_an_inverse_block_keeps_one_block_in_view() -> None:
    mask = mask_of("inverse_block", 0.75)
    uniform = mask_of("uniform", 0.75)
    for i in range(50):
        visible = ~mask((8, 8), 48, stream(0, Purpose.MASK, i))
        assert neighbours(visible) >= 20, "16 units share 24 borders in a block of 4 × 4, and fewer in one of 3 × 6"
        assert neighbours(~uniform((8, 8), 48, stream(0, Purpose.MASK, i))) < 20
    fixed = registry.component("mask", "inverse_block")(ratio=0.75, roll=False)
    seen = np.mean([~fixed((8, 8), 48, stream(0, Purpose.MASK, i)) for i in range(400)], 0)
    rolled = np.mean([~mask((8, 8), 48, stream(0, Purpose.MASK, i)) for i in range(400)], 0)
    assert seen[3:5, 3:5].mean() > 3 * seen[0, 0], "without rolling, corners are rarely visible"
    assert rolled.min() > 0.15, "with rolling, every unit is often visible"


def test_noise_hides_clusters_by_its_colour() -> None:
    cls = registry.component("mask", "noise")

    def borders(**args: Any) -> float:
        mask = cls(ratio=0.5, **args)
        return float(np.mean([neighbours(mask((14, 14), 98, stream(0, Purpose.MASK, i))) for i in range(50)]))

    blue, green, red = borders(fine_sigma=0.0), borders(), borders(fine_sigma=1.5, coarse_sigma=None)
    assert blue < 98 < green < red, "98 of 196 units that are hidden at random share 98 borders"
    with pytest.raises(ValueError, match=r"coarse_sigma: must be above fine_sigma, 2.0; got 1.0"):
        cls(fine_sigma=2.0, coarse_sigma=1.0)
    strong = cls(ratio=0.5, fine_sigma=10.0, coarse_sigma=None)
    drawn = {strong((4, 4), 8, stream(0, Purpose.MASK, i)).tobytes() for i in range(100)}
    assert len(drawn) > 20, "a strong blur leaves large clusters, but not the same ones"


def test_a_grid_is_regular() -> None:
    mask = registry.component("mask", "grid")(period=3)
    for i in range(20):
        rows, cols = np.nonzero(~mask((7, 9), mask.count((7, 9), 0.0), stream(0, Purpose.MASK, i)))
        assert set(np.diff(np.unique(rows))) == {3}
        assert set(np.diff(np.unique(cols))) == {3}
    with pytest.raises(ValueError, match="period: 2 or more"):
        registry.component("mask", "grid")(period=1)


class TestAttentionMask:
    def build(self, strength: float) -> Any:
        vit = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
        mask = registry.component("mask", "attention")(
            teacher="vit_tiny_patch16_224", pretrained=False, args=vit, strength=strength
        )
        torch.manual_seed(0)
        return mask.guide(lambda **asked: frozen_teacher(channels=3, grid=GRID, **asked))

    def test_it_hides_what_the_teacher_attends_to(self) -> None:
        guide, images = self.build(1e6), images_of(raw_of(3))
        drawn = guide(images, noise_of(4)[:, 3], 6)
        attention = guide.teacher.attention(images, GRID)
        assert drawn.flatten(1).sum(1).tolist() == [6] * 4
        hidden, seen = attention[drawn.flatten(1)], attention[~drawn.flatten(1)]
        assert torch.equal(drawn.flatten(1), attention >= attention.topk(6).values[:, -1:])
        assert hidden.mean() > seen.mean()

    def test_attention_is_what_the_block_computes(self) -> None:
        guide, images = self.build(1.0), images_of(raw_of(3))
        model = guide.teacher.model
        model.blocks[-1].attn.fused_attn = False
        caught = []
        model.blocks[-1].attn.attn_drop.register_forward_hook(lambda m, a, out: caught.append(out))
        attention = guide.teacher.attention(images, GRID)
        torch.testing.assert_close(attention, caught[0].mean(1)[:, 0, 1:])

    def test_chance_loosens_it(self) -> None:
        images = images_of(raw_of(3)[:1].expand(64, -1, -1, -1))
        noise = torch.rand(64, *GRID, generator=torch.Generator().manual_seed(0))
        uniform, guided = (self.build(s)(images, noise, 6).float().mean(0) for s in (0.0, 1e6))
        assert uniform.max() < 0.65
        assert set(guided.flatten().tolist()) == {0.0, 1.0}

    def test_teachers_without_readable_attention_are_refused(self) -> None:
        mask = registry.component("mask", "attention")(teacher="pvt_v2_b0", pretrained=False)
        with pytest.raises(ValueError, match="teacher: attention is read from plain ViTs; got a Pyramid"):
            mask.guide(lambda **asked: frozen_teacher(channels=3, grid=(2, 2), **asked))


@pytest.mark.parametrize("name", registry.names("corruption"))
class TestCorruptions:
    def build(self, name: str) -> Any:
        torch.manual_seed(0)
        return registry.component("corruption", name)(CorruptionContext(8, 3, CELL_PX))

    def test_nothing_of_a_hidden_unit_is_left(self, name: str) -> None:
        corruption, raw = self.build(name), raw_of(3)
        units = Units(hidden_of(4), 6, noise_of(4))
        kept = corruption.kept(units)
        blind = units.hidden if kept is None else units.hidden & ~kept
        assert kept is None or not (kept & ~units.hidden).any()
        pixels = repeat_cells(blind, CELL_PX).unsqueeze(1)
        images = images_of(raw)
        before = corruption(images, units)
        other = images._replace(
            raw=raw.masked_fill(pixels, 7), normalised=images.normalised.masked_fill(pixels, torch.nan)
        )
        after = corruption(other, units)
        assert torch.equal(before.images, after.images)
        assert before.enter == after.enter
        assert (before.enter is None) == (not corruption.hidden_enter) == (corruption.mechanism == "drop")
        assert (before.mask_token is None) == (corruption.mechanism != "token")

    def test_visible_units_stay_as_they_are(self, name: str) -> None:
        corruption, images = self.build(name), images_of(raw_of(3))
        units = Units(hidden_of(4), 6, noise_of(4))
        out = corruption(images, units).images
        pixels = repeat_cells(~units.hidden, CELL_PX).unsqueeze(1).expand_as(out)
        assert torch.equal(out[pixels], images.normalised[pixels])

    def test_images_do_not_see_each_other(self, name: str) -> None:
        corruption, raw = self.build(name), raw_of(3)
        units = Units(hidden_of(4), 6, noise_of(4))
        before = corruption(images_of(raw), units).images[0]
        raw[1:] = 255 - raw[1:]
        assert torch.equal(corruption(images_of(raw), units).images[0], before)


def test_bert_masks_copies_and_keeps_the_parts_it_says() -> None:
    corruption = registry.component("corruption", "bert")(CorruptionContext(8, 3, CELL_PX), random=0.2, keep=0.3)
    images, units = images_of(raw_of(3)), Units(hidden_of(4, count=10), 10, noise_of(4))
    out, kept = corruption(images, units), corruption.kept(units)
    assert kept.flatten(1).sum(1).tolist() == [3] * 4
    assert out.replaced.flatten(1).sum(1).tolist() == [5] * 4
    before, after = patchify(images.normalised, CELL_PX), patchify(out.images, CELL_PX)
    assert torch.equal(after[kept.flatten(1)], before[kept.flatten(1)])
    assert (after[out.replaced.flatten(1)] == 0).all()
    copied = units.hidden & ~out.replaced & ~kept
    for i in range(4):
        visible = before[i, ~units.hidden[i].flatten()]
        for patch in after[i, copied[i].flatten()]:
            assert (visible == patch).all(1).any(), "must be a copy of a visible unit of the same image"


@pytest.mark.parametrize(("random", "keep"), [(0.6, 0.5), (0.0, 1.0)])
def test_bert_refuses_parts_that_are_no_parts(random: float, keep: float) -> None:
    with pytest.raises(ValueError, match="at most 1|hides nothing"):
        registry.component("corruption", "bert")(CorruptionContext(8, 3, CELL_PX), random=random, keep=keep)


def test_random_patches_draw_from_all_visible_ones() -> None:
    corruption = registry.component("corruption", "random_patch")(CorruptionContext(8, 3, CELL_PX))
    raw = raw_of(3)[:1].expand(200, -1, -1, -1)
    units = Units(hidden_of(4)[:1].expand(200, -1, -1), 6, torch.rand(200, len(NOISE), *GRID))
    images = images_of(raw)
    out = patchify(corruption(images, units).images, CELL_PX)
    visible = patchify(images.normalised, CELL_PX)[0, ~units.hidden[0].flatten()]
    place = units.hidden[0].flatten().nonzero()[0, 0]
    seen = {int((visible == patch).all(1).nonzero()[0, 0]) for patch in out[:, place]}
    assert seen == set(range(9))


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("name", registry.names("target"))
class TestTargets:
    def hide_other_pixels(self, images: Images, hidden: torch.Tensor) -> Images:
        pixels = repeat_cells(hidden, CELL_PX).unsqueeze(1)
        return images_of(torch.where(pixels, raw_of(images.raw.shape[1], seed=9), images.raw))

    def test_shapes_and_trivial(self, name: str, channels: int) -> None:
        target, x = target_of(name, channels), images_of(raw_of(channels))
        values, trivial = target(x), target.trivial(x, hidden_of(4))
        assert trivial.shape == (4, 15, target.dim)
        if target.of == "classes":
            assert values.dtype == torch.int64
            assert values.shape == (4, 15, target.dim // target.classes)
            assert 0 <= values.min() <= values.max() < target.classes
            torch.testing.assert_close(
                trivial.unflatten(-1, (-1, target.classes)).exp().sum(-1), torch.ones(4, 15, values.shape[-1])
            )
        else:
            assert values.shape == trivial.shape
            assert values.dtype == torch.float32

    def test_some_cells_are_what_they_are_among_all(self, name: str, channels: int) -> None:
        target, x = target_of(name, channels), images_of(raw_of(channels))
        cells = hidden_cells(hidden_of(4), 6)
        assert hasattr(target, "at") or name not in ("pixels", "norm_pixels")
        if hasattr(target, "at"):
            assert torch.equal(target.at(x, cells), gather_cells(target(x), cells))

    def test_trivial_does_not_look_under_the_mask(self, name: str, channels: int) -> None:
        target, x, hidden = target_of(name, channels), images_of(raw_of(channels)), hidden_of(4)
        if "teacher" in name or target.of == "probabilities":  # their trivial prediction is the mean over all images
            mean = target(x).mean(0, keepdim=True).expand(4, -1, -1)
            expected = mean.clamp_min(1e-6).log() if target.of == "probabilities" else mean
            assert torch.equal(target.trivial(x, hidden), expected)
            return
        other = self.hide_other_pixels(x, hidden)
        torch.testing.assert_close(target.trivial(x, hidden), target.trivial(other, hidden), rtol=0, atol=1e-6)

    def test_unaided_picture_does_not_look_under_the_mask(self, name: str, channels: int) -> None:
        target, x, hidden = target_of(name, channels), images_of(raw_of(channels)), hidden_of(4)
        prediction = torch.randn(4, 15, target.dim)
        a, b = (target.picture(prediction, i, hidden, borrow=False) for i in (x, self.hide_other_pixels(x, hidden)))
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert a.shape == x.normalised.shape

    def test_borrowed_picture_of_the_target_is_the_image(self, name: str, channels: int) -> None:
        target, x = target_of(name, channels), images_of(raw_of(channels))
        values = target(x)
        if target.of == "classes":  # the best prediction puts everything on the right class
            values = torch.nn.functional.one_hot(values, target.classes).float().flatten(2)
        picture = target.picture(values, x, hidden_of(4), borrow=True)
        assert (picture is not None) == (name in ("pixels", "norm_pixels", "mean_color", "downsized_color"))
        if picture is None:
            return
        if target.of == "classes":
            part = CELL_PX // int((target.dim // target.classes) ** 0.5)
            means = torch.nn.functional.avg_pool2d(x.raw.float() / 255, part).repeat_interleave(part, 2)
            means = means.repeat_interleave(part, 3)
            drawn = picture * x.std + x.mean
            assert (drawn - means).abs().max() <= 0.5 / 2**target.bits + 1e-2, "must be within half a bin"
        else:
            torch.testing.assert_close(picture, x.normalised, rtol=1e-4, atol=1e-4)

    def test_bf16_images_give_float32_statistics(self, name: str, channels: int) -> None:
        target, x = target_of(name, channels), images_of(raw_of(channels))
        if target.of == "values" and "teacher" not in name:
            assert target(x._replace(normalised=x.normalised.bfloat16())).dtype == torch.float32

    def test_nothing_of_it_is_trained(self, name: str, channels: int) -> None:
        target, x = target_of(name, channels), images_of(raw_of(channels))
        assert not any(p.requires_grad for p in target.parameters())
        assert not target(x).requires_grad


def test_norm_pixels_is_what_it_says() -> None:
    values = target_of("norm_pixels")(images_of(raw_of(3)))
    torch.testing.assert_close(values.mean(-1), torch.zeros(4, 15), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(-1), torch.ones(4, 15), atol=1e-4, rtol=0)


def test_pixels_keeps_the_place_of_every_pixel() -> None:
    images = images_of(raw_of(3))
    assert torch.equal(unpatchify(target_of("pixels")(images), CELL_PX, GRID), images.normalised)


class TestColours:
    """Colour targets are computed from pixels as they were read (ViT, appendix B.1.2)."""

    def test_classes_of_known_colours(self) -> None:
        raw = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
        raw[0, :, :, 4:] = torch.tensor([255, 32, 31], dtype=torch.uint8).view(3, 1, 1)
        images = images_of(raw)
        assert target_of("mean_color", grid=(1, 2))(images).tolist() == [[[0], [7 * 64 + 1 * 8 + 0]]]
        assert target_of("downsized_color", grid=(1, 2))(images).tolist() == [[[0] * 16, [7 * 64 + 8] * 16]]

    def test_a_mean_is_binned_not_the_bins_averaged(self) -> None:
        raw = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        raw[..., :2] = 255  # mean 127.5: bin 3
        assert target_of("mean_color", grid=(1, 1))(images_of(raw)).item() == 3 * 73
        parts = target_of("downsized_color", grid=(1, 1))(images_of(raw)).view(4, 4)
        assert parts[:, :2].eq(511).all()
        assert parts[:, 2:].eq(0).all()

    @pytest.mark.parametrize("name", ["mean_color", "downsized_color"])
    def test_normalised_pixels_are_an_error(self, name: str) -> None:
        images = images_of(raw_of(3))
        with pytest.raises(
            ValueError, match="colours are taken from uint8 pixels, as they were read; got torch.float32"
        ):
            target_of(name)(images._replace(raw=images.normalised))

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="side: must divide the cell, 4 px; got 3"):
            target_of("downsized_color", side=3)
        for name in ("mean_color", "downsized_color"):
            with pytest.raises(ValueError, match="bits: 6 for 3 channels makes more than 65,536 classes"):
                target_of(name, bits=6)


class TestTeachers:
    def test_features_are_the_normalised_mean_of_the_last_blocks(self) -> None:
        target, x = target_of("teacher", layers=2), images_of(raw_of(3))
        model = target.teacher.model
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
        found = model.forward_intermediates(
            (x.raw.float() / 255 - mean) / std, indices=2, output_fmt="NLC", intermediates_only=True
        )
        expected = sum(torch.nn.functional.layer_norm(f, f.shape[-1:]) for f in found) / 2
        torch.testing.assert_close(target(x), expected)

    def test_a_coarser_teacher_sees_larger_images(self) -> None:
        target = target_of("teacher", args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2})
        assert target.teacher.pixels(images_of(raw_of(3)), GRID).shape == (4, 3, 24, 40)
        assert target(images_of(raw_of(3))).shape == (4, 15, 24)

    def test_an_export_teaches_with_its_weights(self, tmp_path: Path) -> None:
        from mpp.encoders.folder import save_encoder, trained_by

        recipe = pretrain_recipe("none", "none", **{"data.image_size": (12, 20), "data.mean": [0.2, 0.3, 0.4]})
        model = build_model(recipe)[0].eval()
        save_encoder(model.encoder.model, tmp_path / "run" / "encoder", trained_by(recipe), {})
        images = images_of(raw_of(3))
        normalised = (images.raw.float() / 255 - torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1)) / 0.5
        with torch.no_grad():
            (found,) = model.encoder.model.forward_intermediates(
                normalised, indices=1, output_fmt="NLC", intermediates_only=True
            )
        for folder in (tmp_path / "run", tmp_path / "run" / "encoder"):
            target = target_of("teacher", teacher=str(folder), pretrained=True, args={})
            torch.testing.assert_close(target(images), torch.nn.functional.layer_norm(found, found.shape[-1:]))

    def test_any_family_teaches(self) -> None:
        assert target_of("teacher", teacher="resnet18", args={})(images_of(raw_of(3))).shape == (4, 15, 512)

    def test_a_teacher_leaves_the_students_first_weights_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        target_of("teacher")
        assert torch.equal(torch.rand(3), expected)

    def test_more_layers_than_there_are_is_refused(self) -> None:
        for name in ("teacher", "ema_teacher"):
            with pytest.raises(ValueError, match="layers: VisionTransformer has 2 last ones of one shape; got 3"):
                target_of(name, layers=3)

    def test_the_moving_average_moves_as_far_as_it_says(self) -> None:
        target = target_of("ema_teacher", decay=0.5, decay_end=1.0)
        student = adapt(copy.deepcopy(target.teacher.model), (12, 20))
        before = [p.clone() for p in target.teacher.model.parameters()]
        with torch.no_grad():
            for p in student.model.parameters():
                p += 1
        made, left_out = torch.tensor(True), torch.tensor(False)
        target.after_step(student, 1, 11, left_out)
        for p, old in zip(target.teacher.model.parameters(), before, strict=True):
            assert torch.equal(p, old)
        target.after_step(student, 1, 11, made)  # decay 0.5
        for p, old in zip(target.teacher.model.parameters(), before, strict=True):
            torch.testing.assert_close(p, old + 0.5)
        target.after_step(student, 11, 11, made)  # decay 1: the teacher does not move
        for p, old in zip(target.teacher.model.parameters(), before, strict=True):
            torch.testing.assert_close(p, old + 0.5)

    def test_teachers_stay_in_eval_mode(self) -> None:
        for name in ("teacher", "ema_teacher"):
            assert not any(m.training for m in target_of(name).train().teacher.modules())


def test_hog_of_visible_cells_does_not_see_the_blank() -> None:
    """In an image of vertical stripes, the edges of blanked hidden cells must not vote."""
    raw = (torch.arange(20) % 2 * 200).to(torch.uint8).expand(1, 3, 12, 20).contiguous()
    raw = torch.nn.functional.interpolate(raw.float(), scale_factor=2).to(torch.uint8)
    target, hidden = target_of("hog", cell_px=8), hidden_of(1)
    trivial = target.trivial(images_of(raw), hidden).view(1, 15, 3, 9)
    across = 4  # the bin of 9 that is 90 degrees from the vertical
    assert (trivial[..., across] > 0.3).all(), "all differences are across columns"
    assert trivial[..., [k for k in range(9) if k != across]].abs().max() < 1e-6


@pytest.mark.parametrize(("cell_px", "orientations"), [(8, 9), (4, 5), (1, 2)])
def test_hog_counts_votes_on_a_cpu_as_on_a_gpu(cell_px: int, orientations: int) -> None:
    target = target_of("hog", cell_px=cell_px, orientations=orientations)
    rng = torch.Generator().manual_seed(0)
    strength = torch.rand(2, 3, 16, 24, generator=rng)
    bins = torch.randint(0, orientations, strength.shape, generator=rng, dtype=torch.int32)
    torch.testing.assert_close(target._add_votes(strength, bins), target._pool_votes(strength, bins))


def test_image_share_of_known_values() -> None:
    constant = torch.randn(1, 6, 8).expand(50, -1, -1)
    assert image_share(constant) == pytest.approx(0, abs=1e-12)
    noise = torch.randn(50, 6, 8, generator=torch.Generator().manual_seed(0))
    assert image_share(noise) == pytest.approx(1, abs=0.05)
    assert image_share(constant / constant.std() + 0.1 * noise) < 0.05


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1)
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    two = torch.cat([torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])]).repeat(5, 1)
    assert effective_rank(two) == pytest.approx(2)


@pytest.mark.parametrize("name", registry.names("loss"))
def test_losses_are_scalar_float32_means(name: str) -> None:
    loss = registry.component("loss", name)()
    prediction = torch.randn(4, 6, 8).bfloat16()
    if loss.of == "classes":
        target = torch.randint(0, 4, (4, 6, 2))  # two predictions of four classes each
        best: torch.Tensor = 1e4 * torch.nn.functional.one_hot(target, 4).float().flatten(2)
    elif loss.of == "probabilities":
        target = torch.nn.functional.one_hot(torch.randint(0, 8, (4, 6)), 8).float()
        best = 1e4 * target
    else:
        best = target = torch.randn(4, 6, 8)
    value = loss(prediction, target)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert float(value) > 0.1
    assert float(loss(best, target)) == pytest.approx(0, abs=1e-6)
    twice = loss(torch.cat([prediction, prediction], 1), torch.cat([target, target], 1))
    torch.testing.assert_close(twice, value)  # the loss is a mean over cells


def test_losses_have_the_value_of_their_formula() -> None:
    prediction, target = torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[1.0, 0.0]]])
    for name, args, expected in (
        ("mse", {}, 5.0),
        ("l1", {}, 2.0),
        ("smooth_l1", {"beta": 2.0}, (0.25 + 2.0) / 2),
        ("cosine", {}, 1.0),
    ):
        assert float(registry.component("loss", name)(**args)(prediction, target)) == pytest.approx(expected)
    logits = torch.tensor([[[0.0, np.log(3), 0.0, 0.0]]])  # two predictions with probabilities 1/4, 3/4 and 1/2, 1/2
    found = registry.component("loss", "cross_entropy")()(logits, torch.tensor([[[1, 0]]]))
    assert float(found) == pytest.approx((np.log(4 / 3) + np.log(2)) / 2)


HEADS_AND_LAYOUTS = [
    (name, layout)
    for name in registry.names("head")
    for layout in ("raster", "visible", "visible+predicted")
    if not (registry.component("head", name).needs_hidden_tokens and layout == "visible")  # refused by the model
]


@pytest.mark.parametrize(("name", "layout"), HEADS_AND_LAYOUTS)
class TestHeads:
    def build(self, name: str, layout: str) -> Any:
        torch.manual_seed(0)
        return registry.component("head", name)(16, 10, layout != "visible").eval()

    def features(self, layout: str, cells: Cells) -> EncoderOutput:
        tokens = {"raster": 15, "visible": 9, "visible+predicted": 15}[layout]
        return EncoderOutput(torch.randn(3, tokens, 16, generator=torch.Generator().manual_seed(2)), cells, layout)  # type: ignore[arg-type]

    def test_shape_and_gradients(self, name: str, layout: str) -> None:
        head = self.build(name, layout)
        out = head(self.features(layout, cells_of(3)))
        assert out.shape == (3, 6, 10)
        out.square().sum().backward()
        dead = [n for n, p in head.named_parameters() if p.grad is None]
        assert not dead, f"no gradient reaches {dead}: DDP would wait for it"

    def test_images_do_not_see_each_other(self, name: str, layout: str) -> None:
        head, cells = self.build(name, layout), cells_of(3)
        features = self.features(layout, cells)
        with torch.no_grad():
            before = head(features)[0].clone()
            features.tokens[1:] = torch.randn_like(features.tokens[1:])
            torch.testing.assert_close(head(features)[0], before)


def test_a_decoder_width_that_heads_do_not_divide_is_refused() -> None:
    for name in ("transformer", "cross_attention"):
        with pytest.raises(ValueError, match="multiple of 4"):
            registry.component("head", name)(16, 10, True, dim=30)
