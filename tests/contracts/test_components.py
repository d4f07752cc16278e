"""What every component of a folder must do, whichever files the folder holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp import registry
from mpp.patches import hidden_cells, repeat_cells, unpatchify, visible_cells
from mpp.rng import Purpose, stream
from mpp.types import Cells, EncoderOutput

GRID, CELL_PX = (3, 5), 4


def hidden_of(batch: int, grid: tuple[int, int] = GRID, count: int = 6) -> torch.Tensor:
    rows = [stream(0, Purpose.MASK, i).permutation(grid[0] * grid[1]) < count for i in range(batch)]
    return torch.from_numpy(np.stack(rows)).view(batch, *grid)


def cells_of(batch: int, count: int = 6) -> Cells:
    hidden = hidden_of(batch, count=count)
    return Cells(hidden, visible_cells(hidden, count), hidden_cells(hidden, count))


@pytest.mark.parametrize("folder", registry.SUFFIX)
def test_name_is_file_is_class_and_documented(folder: str) -> None:
    for name in registry.names(folder):
        cls = registry.component(folder, name)
        assert cls.__doc__, f"{cls} has no docstring"
        assert cls.__module__ == f"mpp.{folder}.{name}"
        for key, parameter in registry.recipe_arguments(cls).items():
            assert parameter.annotation is not parameter.empty, f"{cls}: {key} has no type to check recipes with"
            assert f"`{key}`" in cls.__doc__, f"{cls}: {key} is not documented"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="uniform"):
        registry.component("masks", "unifrom")


@pytest.mark.parametrize("name", registry.names("masks"))
@settings(max_examples=60, deadline=None)
@given(gh=st.integers(1, 9), gw=st.integers(2, 9), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 2**40))
def test_masks_hide_a_count_that_depends_on_the_grid_alone(
    name: str, gh: int, gw: int, ratio: float, seed: int
) -> None:
    mask = registry.component("masks", name)(ratio=ratio)
    drawn = [mask((gh, gw), stream(seed, Purpose.MASK, i)) for i in range(3)]
    expected = min(max(round(gh * gw * ratio), 1), gh * gw - 1)
    for m in drawn:
        assert m.shape == (gh, gw)
        assert m.dtype == bool
        assert m.sum() == expected
    again = mask((gh, gw), stream(seed, Purpose.MASK, 0))
    assert (again == drawn[0]).all(), "a mask must be a pure function of its generator"


@pytest.mark.parametrize("name", registry.names("masks"))
def test_masks_differ_between_positions_and_reach_every_cell(name: str) -> None:
    mask = registry.component("masks", name)(ratio=0.4)
    drawn = np.stack([mask((6, 6), stream(0, Purpose.MASK, i)) for i in range(200)])
    assert len({m.tobytes() for m in drawn}) > 150
    assert drawn.any(0).all()
    assert not drawn.all(0).any()


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("name", registry.names("targets"))
class TestTargets:
    def images(self, channels: int) -> torch.Tensor:
        return torch.randn(
            4, channels, GRID[0] * CELL_PX, GRID[1] * CELL_PX, generator=torch.Generator().manual_seed(1)
        )

    def test_shapes_and_trivial(self, name: str, channels: int) -> None:
        target, x = registry.component("targets", name)(channels, CELL_PX), self.images(channels)
        values = target(x)
        assert values.shape == (4, 15, target.dim)
        assert values.dtype == torch.float32
        assert target.trivial(x, hidden_of(4)).shape == values.shape

    def test_trivial_does_not_look_under_the_mask(self, name: str, channels: int) -> None:
        target, x, hidden = (
            registry.component("targets", name)(channels, CELL_PX),
            self.images(channels),
            hidden_of(4),
        )
        pixels = repeat_cells(hidden, CELL_PX).unsqueeze(1)
        other = torch.where(pixels, torch.randn_like(x), x)
        torch.testing.assert_close(target.trivial(x, hidden), target.trivial(other, hidden), rtol=0, atol=1e-6)

    def test_unaided_picture_does_not_look_under_the_mask(self, name: str, channels: int) -> None:
        target, x, hidden = (
            registry.component("targets", name)(channels, CELL_PX),
            self.images(channels),
            hidden_of(4),
        )
        values = torch.randn(4, 15, target.dim)
        pixels = repeat_cells(hidden, CELL_PX).unsqueeze(1)
        other = torch.where(pixels, torch.randn_like(x), x)
        a, b = (target.picture(values, i, hidden, borrow=False) for i in (x, other))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_borrowed_picture_of_the_target_is_the_image(self, name: str, channels: int) -> None:
        target, x = registry.component("targets", name)(channels, CELL_PX), self.images(channels)
        picture = target.picture(target(x), x, hidden_of(4), borrow=True)
        torch.testing.assert_close(picture, x, rtol=1e-4, atol=1e-4)

    def test_bf16_images_give_float32_statistics(self, name: str, channels: int) -> None:
        target, x = registry.component("targets", name)(channels, CELL_PX), self.images(channels)
        assert target(x.bfloat16()).dtype == torch.float32


def test_norm_pixels_is_what_it_says() -> None:
    target = registry.component("targets", "norm_pixels")(3, CELL_PX)
    values = target(torch.randn(2, 3, 8, 8) * 7 + 3)
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(-1), torch.ones(2, 4), atol=1e-4, rtol=0)


def test_pixels_keeps_the_place_of_every_pixel() -> None:
    target = registry.component("targets", "pixels")(3, CELL_PX)
    x = torch.randn(2, 3, 12, 20)
    assert torch.equal(unpatchify(target(x), CELL_PX, GRID), x)


@pytest.mark.parametrize("name", registry.names("losses"))
def test_losses_are_scalar_float32_means(name: str) -> None:
    loss = registry.component("losses", name)()
    prediction, target = torch.randn(4, 6, 8).bfloat16(), torch.randn(4, 6, 8)
    value = loss(prediction, target)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert float(loss(target, target)) == 0
    twice = loss(torch.cat([prediction, prediction], 1), torch.cat([target, target], 1))
    torch.testing.assert_close(twice, value)  # a mean over cells: not divided by their number again


HEADS_AND_LAYOUTS = [
    (name, layout)
    for name in registry.names("heads")
    for layout in ("raster", "visible", "visible+predicted")
    if not (registry.component("heads", name).needs_hidden_tokens and layout == "visible")  # refused by the model
]


@pytest.mark.parametrize(("name", "layout"), HEADS_AND_LAYOUTS)
class TestHeads:
    def build(self, name: str, layout: str) -> Any:
        torch.manual_seed(0)
        return registry.component("heads", name)(16, 10, layout != "visible").eval()

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
            registry.component("heads", name)(16, 10, True, dim=30)
