"""Reconstructions: what each picture shows, and the pictures that a run keeps while it trains."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import mpp
from mpp.cli.app import main
from mpp.data.batch import Images
from mpp.data.shards.reader import evenly
from mpp.drawing.sheets import sheet
from mpp.encoders.cells import repeat_cells
from mpp.errors import UserError
from mpp.inspection.reconstruct import OF_A_FOLDER, reconstruct
from mpp.objective.build import build_mask, build_model
from mpp.objective.interfaces import TargetContext
from mpp.objective.mask_drawing import draw_masks
from mpp.objective.reconstruct import reconstruct as draw_predictions
from mpp.objective.targets.hog import HogTarget
from mpp.runs.pictures import (
    BORROWED,
    GREY,
    MOST_KEPT,
    Kept,
    Reconstruction,
    keep,
    kept_every,
    pasted,
    read_kept,
    spread,
    strip,
)
from mpp.runs.records import read_metrics
from tests.conftest import drawn_image, encoded, pretrain_recipe

TITLES = {
    "pixels": ["original", "masked", "predicted", "pasted"],
    "norm_pixels": ["original", "masked", "predicted", "pasted", BORROWED],
    "mean_color": ["original", "masked", "target", "predicted", "pasted"],
    "downsized_color": ["original", "masked", "target", "predicted", "pasted"],
    "hog": ["original", "masked", "target", "predicted", "pasted"],
}


def pictures(shards: Path, out: Path, **changes: Any) -> tuple[list[Reconstruction], torch.Tensor, torch.Tensor]:
    """Return a new model's predictions of four images, the images in [0, 1], and the hidden pixels."""
    recipe = pretrain_recipe(shards, out, **changes)
    model, grid = build_model(recipe)
    channels = recipe.data.channels
    arrays = [np.asarray(drawn_image(i, 16, channels)).reshape(16, 16, channels) for i in range(4)]
    raw = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    units = draw_masks(build_mask(recipe), grid, 0.5, 0, range(4))
    found = draw_predictions(model.eval(), raw, units)
    return found, raw.float() / 255, repeat_cells(units.hidden, 4).unsqueeze(1)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("target", TITLES)
def test_panels(target: str, channels: int, shards: Path, tmp_path: Path) -> None:
    found, original, hidden = pictures(shards, tmp_path, target=target, **{"data.channels": channels})
    assert [f.target for f in found] == [target]
    panels = {p.title: p.images for p in found[0].panels}
    assert list(panels) == TITLES[target]
    assert torch.equal(panels["original"], original)
    where = hidden.expand_as(original)
    assert torch.equal(panels["masked"], torch.where(where, GREY, original))
    for title, images in panels.items():
        assert 0 <= float(images.min()) <= float(images.max()) <= 1, title
        if title.startswith("pasted") and target != "hog":
            assert torch.equal(images[~where], original[~where]), "visible pixels must stay unchanged"
            assert not torch.equal(images[where], original[where])
    if target != "hog":
        assert torch.equal(panels["predicted"][where], panels["pasted"][where])
        assert (panels["predicted"][~where] == GREY).all()


def test_every_target_with_a_picture_is_drawn(shards: Path, tmp_path: Path) -> None:
    extra = [{"target": "ema_teacher"}, {"target": "mean_color"}, {"target": "hog"}]
    found, *_ = pictures(shards, tmp_path, target="pixels", extra_targets=extra)
    assert [f.target for f in found] == ["pixels", "mean_color", "hog"]
    assert pictures(shards, tmp_path, target="ema_teacher")[0] == []


def test_all_hidden_cells_are_predicted_whatever_part_trains(shards: Path, tmp_path: Path) -> None:
    found, _, hidden = pictures(shards, tmp_path, target="pixels", predict_fraction=0.1)
    panels = {p.title: p.images for p in found[0].panels}
    patches = panels["predicted"].masked_fill(~hidden, 0).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).var(-1).sum(1)
    assert ((patches > 0) == hidden[:, 0, ::4, ::4]).all()


# ---- glyphs


def hog(**args: Any) -> HogTarget:
    def no_teacher(**asked: Any) -> None:
        raise AssertionError

    return HogTarget(TargetContext(1, 8, (2, 2), no_teacher, no_teacher), **args)


@pytest.mark.parametrize(("pattern", "axis"), [("columns", 0), ("rows", 1)])
def test_glyphs_lie_along_the_edges(pattern: str, axis: int) -> None:
    """Vertical stripes give vertical lines."""
    stripes = (255 * ((torch.arange(16) // 2) % 2)).to(torch.uint8).expand(16, 16)
    raw = (stripes if pattern == "columns" else stripes.T)[None, None].contiguous()
    half = torch.full((1, 1, 1), 0.5)
    target = hog(orientations=8)
    drawn = target.glyphs(target(Images(raw, raw.float(), half, half)), (2, 2))
    assert drawn.shape == (1, 1, 32, 32)
    glyph = drawn[0, 0, :16, :16]
    along, across = glyph.sum(axis), glyph.sum(1 - axis)
    assert float(along.max()) > 3 * float(across.max()), "expected one line as long as the square"


def test_a_glyph_is_as_bright_as_its_bin_and_points_as_it_does() -> None:
    target = hog(orientations=4, square_px=8)
    values = torch.zeros(1, 4, 4)
    values[0, 2, 0] = 0.6  # bin 0: gradients of 0 to 45 degrees from the vertical, in the second row, first column
    drawn = target.glyphs(values, (2, 2))[0, 0]
    assert float(drawn.max()) == pytest.approx(0.6)
    assert float(drawn[:16].sum()) == 0
    assert float(drawn[:, 16:].sum()) == 0
    rows, cols = torch.nonzero(drawn > 0.3, as_tuple=True)
    slope = torch.linalg.lstsq(
        (cols - cols.float().mean())[:, None].float(), (rows - rows.float().mean())[:, None].float()
    )
    assert math.degrees(math.atan(float(slope.solution))) == pytest.approx(-22.5, abs=3)


# ---- kept while training


def test_steps_that_are_kept() -> None:
    assert kept_every(8000, 500) == 1000
    assert kept_every(100, 500) == 500
    for total in range(1, 5000, 97):
        assert total // kept_every(total, 10) <= MOST_KEPT
    steps = [Kept(i, "pixels", {}) for i in range(13)]
    assert [k.step for k in spread(steps, 5)] == [0, 2, 4, 8, 12]
    assert spread(steps[:2], 5) == steps[:2]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept") / "run"
    mpp.pretrain(pretrain_recipe(shards, out, skill_every_steps=5, reconstruct_images=3))
    return out


def test_a_run_keeps_the_same_images_at_each_step(run: Path) -> None:
    kept = read_kept(run)
    assert [k.step for k in kept] == [0, 5, 10, 15, 20]
    assert pasted(kept) == ["pasted", BORROWED]
    for title in ("original", "masked"):
        first = [np.asarray(t) for t in kept[0].panels[title]]
        assert len(first) == 3
        for k in kept[1:]:
            assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(first, k.panels[title], strict=True))
    assert not np.array_equal(np.asarray(kept[0].panels["pasted"][0]), np.asarray(kept[-1].panels["pasted"][0]))


def test_the_last_picture_is_that_of_the_last_checkpoint(run: Path, shards: Path) -> None:
    from mpp.recipe.loading import load_recipe
    from mpp.recipe.pretrain import PretrainRecipe
    from mpp.runs import checkpoint

    recipe = load_recipe(run / "recipe.yaml", PretrainRecipe)
    model, _ = build_model(recipe)
    checkpoint.load(checkpoint.newest(run / "checkpoints"), model)  # type: ignore[arg-type]
    from mpp.data.crop import Crop
    from mpp.data.shards.reader import ShardImages, held_out_rows
    from mpp.pretraining.dataset import PretrainDataset
    from mpp.pretraining.setup import _held_out_batch

    images = ShardImages(recipe.data.shards, key="data.shards")
    held_out = held_out_rows(images.counts, recipe.data.held_out)
    counts = np.asarray(images.counts) - held_out
    crop = Crop((16, 16), 3, (0.2, 1.0), (1.0, 1.0), 0.5, recipe.data.formats, recipe.data.max_image_pixels)
    batch = _held_out_batch(PretrainDataset(images, crop, build_mask(recipe), (4, 4), 0, counts, 16))
    found = draw_predictions(model.eval(), batch.images[:3], batch.units.of(slice(3)))
    shown = next(p.images for p in found[0].panels if p.title == "pasted")
    wanted = (255 * shown).round().byte().permute(0, 2, 3, 1).numpy()
    for tile, array in zip(read_kept(run)[-1].panels["pasted"], wanted, strict=True):
        assert np.array_equal(np.asarray(tile), array)


def test_keeping_pictures_changes_nothing_in_training(run: Path, shards: Path, tmp_path: Path) -> None:
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", skill_every_steps=5, reconstruct_images=0))
    assert not (tmp_path / "run" / "reconstructions").exists()
    losses = [[m["loss"].hex() for m in read_metrics(r)] for r in (run, tmp_path / "run")]
    assert losses[0] == losses[1]


def test_a_run_goes_on_where_pictures_cannot_be_kept(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpp.pretraining.measure.keep", full)
    result = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 2}))
    assert result.state == "finished"
    assert (
        "the pictures of step 2 are not kept: No space left on device" in (tmp_path / "run" / "train.log").read_text()
    )


def test_strip_and_animation(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["reconstruct", str(run), "--out", str(tmp_path / "strip.png")])
    assert done.exit_code == 0, done.output
    kept = read_kept(run)
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width == strip(kept, "pasted").width
        assert picture.height > 2 * strip(kept, "pasted").height, "both drawings must be shown, one below the other"
    for name, frames in (("a.gif", 5), ("a.webp", 5)):
        done = CliRunner().invoke(main, ["reconstruct", str(run), "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        with Image.open(tmp_path / name) as picture:
            assert picture.n_frames == frames  # type: ignore[attr-defined]


def test_glyphs_are_kept_as_large_as_they_are(shards: Path, tmp_path: Path) -> None:
    found, *_ = pictures(shards, tmp_path, target="hog")
    keep(tmp_path, 7, found)
    (kept,) = read_kept(tmp_path)
    for panel in found[0].panels:
        scale = 64 // panel.images.shape[-1]
        wanted = (255 * panel.images[1]).round().byte().expand(3, -1, -1).permute(1, 2, 0)
        wanted = wanted.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        assert np.array_equal(np.asarray(kept.panels[panel.title][1]), wanted.numpy()), panel.title
    assert len(found[0].panels) == 5


def test_a_file_that_is_not_its_own_is_passed_over(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "reconstructions"
    (folder / "step-00000001.png").write_text("no picture")
    (folder / "step-00000002.png").write_bytes(encoded(drawn_image(0)))
    assert [k.step for k in read_kept(tmp_path / "run")] == [0, 5, 10, 15, 20]


def test_errors(run: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(drawn_image(0)))
    words = ["reconstruct", str(run), str(tmp_path / "a.png"), "--out", str(tmp_path / "x.gif")]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, "an animation is of a run's own images" in done.output) == (2, True)
    mpp.pretrain(pretrain_recipe(shards, tmp_path / "teacher", target="ema_teacher", **{"optim.steps": 1}))
    for images, message in (((), "no pictures kept while it trained"), ((str(tmp_path / "a.png"),), "has no picture")):
        done = CliRunner().invoke(main, ["reconstruct", str(tmp_path / "teacher"), *images])
        assert done.exit_code == 2, done.output
        assert message in done.output


def test_long_titles_do_not_run_into_the_next_column() -> None:
    tiles = [Image.new("RGB", (100, 50))] * 2
    plain, wrapped = (
        sheet([tiles], titles).height for titles in (["a", "b"], ["pasted, own statistics borrowed", "b"])
    )
    assert wrapped > plain


def test_a_picture_over_an_image_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(drawn_image(0)))
    from mpp.inspection.reconstruct import reconstruct

    with pytest.raises(UserError, match="is one of the images"):
        reconstruct(run, [str(tmp_path / "a.png")], tmp_path / "a.png")


def test_a_folder_is_drawn_by_a_few_of_its_images(run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "photos" / "deeper" / f"{i}.png").write_bytes(encoded(drawn_image(i)))
    whole = Image.open(reconstruct(run, [str(tmp_path / "photos")], tmp_path / "folder.png"))
    files = sorted(str(p) for p in (tmp_path / "photos" / "deeper").iterdir())
    few = Image.open(reconstruct(run, [files[i] for i in evenly(20, OF_A_FOLDER)], tmp_path / "files.png"))
    assert whole.tobytes() == few.tobytes()
