"""`mpp inspect`: every family, real files, and encoders whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import mpp
from mpp.cli.app import main
from mpp.drawing.plots import is_own_svg
from mpp.encoders.support import FAMILIES, Family
from mpp.errors import UserError
from mpp.inspection import run as inspection
from mpp.inspection import views
from mpp.inspection.measures import LEAST_IMAGES, mean_attention_distance, places
from mpp.inspection.observing import InspectedEncoder, attend, see_all
from tests.conftest import pretrain_recipe
from tests.inspection.test_reading import EVERYWHERE, KINDS, toy, vit

ALWAYS = {"colours", "image_map", "spectrum", "similarity", "space", "filters"}


def subject_of(model: Any, size: tuple[int, int], name: str = "toy") -> InspectedEncoder:
    half = torch.full((3, 1, 1), 0.5)
    return InspectedEncoder(
        name, model, size, 3, half, half, {"channels": 3, "formats": ("PNG",), "max_image_pixels": 10**6}
    )


def drawn(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return smooth random images, whose neighbouring pixels are alike."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return (255 * smooth).clamp(0, 255).byte()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.title)
def test_every_family_is_seen(family: Family) -> None:
    subject, images = subject_of(toy(family), family.image_size), drawn(8, family.image_size)
    seen = see_all([subject], [images], 2)
    attention = attend(subject, images, 2)
    found: dict[str, Any] = {
        "colours": views.colours(seen),
        "image_map": views.image_map(seen, images),
        "spectrum": views.spectrum(seen),
        "maps": views.attention_maps(subject, attention, images[:2]),
        "distance": views.attention_distance(subject, attention),
        "similarity": views.similarity(seen, None),
        "skips": views.skips(seen),
        "space": views.space(seen),
        "positions": views.positions(subject),
        "filters": views.filters(subject),
    }
    for name in ALWAYS:
        assert isinstance(found[name], views.View), (name, found[name])
    assert isinstance(found["maps"], views.View) == (family.title in EVERYWHERE)
    assert isinstance(found["distance"], views.View) == (KINDS[family.title] not in ("none", "not known"))
    for view in found.values():
        if isinstance(view, views.View):
            json.dumps(view.numbers, allow_nan=False)
        else:
            assert len(view) > 10, "expected a reason"
    table = torch.tensor(found["similarity"].numbers["cka"], dtype=torch.float64)
    torch.testing.assert_close(table.diagonal(), torch.ones(len(table), dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(table, table.T)


def test_attention_without_weights_is_even_and_stays_even_through_all_blocks() -> None:
    model = vit(num_heads=2)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.qkv.bias)
    subject, images = subject_of(model, (16, 16)), drawn(8, (16, 16))
    found = attend(subject, images, 2)
    distance = views.attention_distance(subject, found)
    assert isinstance(distance, views.View)
    where = places((4, 4), 4)
    even = float(mean_attention_distance(torch.ones(1, 1, 16, 16), where, where))
    assert [d for row in distance.numbers["distance_px"] for d in row] == pytest.approx([even] * 6)
    assert distance.numbers["uniform_distance_px"] == pytest.approx([even] * 3)
    assert [e for row in distance.numbers["entropy"] for e in row] == pytest.approx([1.0] * 6)
    maps = views.attention_maps(subject, found, images[:2])
    assert isinstance(maps, views.View)
    # ((I + J / 17) / 2) ** 3, and of a patch's row only the part of the 16 patches
    own, others = 1 / 8 + 7 / 8 / 17, 7 / 8 / 17
    assert maps.numbers["own_share"] == pytest.approx(own / (own + 15 * others))


def test_blocks_that_add_nothing_leave_one_representation() -> None:
    model = vit(depth=4)
    for block in model.blocks[1:]:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    seen = see_all([subject_of(model, (16, 16))], [drawn(16, (16, 16))], 2)
    view = views.similarity(seen, None)
    cka = torch.tensor(view.numbers["cka"])
    torch.testing.assert_close(cka, torch.ones(4, 4), atol=1e-3, rtol=0)
    skips = views.skips(seen)
    assert isinstance(skips, views.View)
    assert skips.numbers["block"] == [1], "the other blocks add nothing"


class GrowingBlock(torch.nn.Module):
    """A block that adds a quarter of its input."""

    def forward(self, x: torch.Tensor, **ignored: Any) -> torch.Tensor:
        return 1.25 * x


def test_what_is_carried_on_over_what_is_added() -> None:
    model = vit()
    for i in range(3):
        model.blocks[i] = GrowingBlock()
    skips = views.skips(see_all([subject_of(model, (16, 16))], [drawn(8, (16, 16))], 2))
    assert isinstance(skips, views.View)
    assert skips.numbers["skip_over_branch"] == pytest.approx([4.0] * 3)


def test_an_encoder_and_itself_are_the_same_to_cka() -> None:
    model, images = vit(), drawn(16, (16, 16))
    both = [subject_of(model, (16, 16)), subject_of(model, (16, 16), "again")]
    numbers = views.similarity(see_all(both, [images, images], 2), both[1]).numbers
    torch.testing.assert_close(torch.tensor(numbers["cka_cross"]), torch.tensor(numbers["cka"]), atol=1e-4, rtol=0)
    assert numbers["cka_cross_without_skip"] == numbers["cka_without_skip"]
    assert numbers["other"] == "again"


def test_the_map_puts_like_images_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of images, in turn: the nearest image on the map must be of the same kind."""
    images = torch.cat([drawn(40, (16, 16), seed) // 4 + 180 * (seed % 2) for seed in range(2)])
    images = images.view(2, 40, 3, 16, 16).transpose(0, 1).flatten(0, 1)
    seen = see_all([subject_of(vit(), (16, 16))], [images], 2)
    view = views.image_map(seen, images)
    assert isinstance(view, views.View)
    at = torch.tensor(view.numbers["places"])
    nearest = (torch.cdist(at, at) + 1e9 * torch.eye(80)).argmin(1)
    assert (nearest % 2 == torch.arange(80) % 2).float().mean() > 0.95
    alike = images[:1].expand(8, -1, -1, -1)
    assert "the same for all images" in str(views.image_map(see_all([subject_of(vit(), (16, 16))], [alike], 2), alike))
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    assert "needs scikit-learn: pip install" in str(views.image_map(seen, images))


def test_minibatches_cover_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpp.inspection import observing

    monkeypatch.setattr(observing, "BATCH", 6)
    seen = see_all([subject_of(vit(), (16, 16))], [drawn(20, (16, 16))], 2)
    assert [len(p) for p in seen.layers[0].pooled] == [7, 7, 6]
    assert views.spectrum(seen).numbers["images"] == 20


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspected") / "run"
    mpp.pretrain(pretrain_recipe(shards, out, **{"optim.steps": 3}))
    return out


def test_what_is_written(run: Path, shards: Path, image_folder: Path, tmp_path: Path) -> None:
    found = mpp.inspect(run, [str(shards), str(image_folder)], images=24, shown=2)
    assert found.out == run / "inspect"
    assert found.images == 24
    index = json.loads((found.out / "index.json").read_text())
    assert [v["name"] for v in index["views"]] == [v.name for v in found.views]
    assert len(found.views) == 10
    assert not index["absent"]
    for view in index["views"]:
        assert json.loads((found.out / f"{view['name']}.json").read_text())
        assert is_own_svg((found.out / f"{view['name']}.svg").read_text())
        with Image.open(found.out / f"{view['name']}.png") as picture:
            assert min(picture.size) > 100
        assert view["summary"] in found.table()
    again = mpp.inspect(run, [str(shards), str(image_folder)], images=24, shown=2, out=tmp_path / "again")
    for view in found.views:
        name = f"{view.name}.json"
        assert (found.out / name).read_text() == (again.out / name).read_text(), (
            "the numbers must be the same every time"
        )


def test_command_line(run: Path, shards: Path, tmp_path: Path) -> None:
    words = ["inspect", "resnet18", str(shards), "--random", "--compare", str(run), "--count", "8"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert "Mean attention distance: not available: ResNet has no attention layers" in done.output
    assert "cka_cross" in json.loads((tmp_path / "o" / "similarity.json").read_text())


def test_images_of_five_channels_and_twelve_bits(tmp_path: Path) -> None:
    (tmp_path / "bands").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        np.save(tmp_path / "bands" / f"{i}.npy", rng.integers(0, 400, (5, 16, 16), dtype=np.uint16))
    deep = {"data.channels": 5, "data.value_range": [0, 4095], "optim.steps": 2}
    mpp.pretrain(pretrain_recipe(tmp_path / "bands", tmp_path / "run", **deep))
    found = mpp.inspect(tmp_path / "run", [str(tmp_path / "bands")], images=20)
    assert {view.name for view in found.views} >= ALWAYS
    assert found.images == 20
    first = views._pixels(torch.from_numpy(np.load(tmp_path / "bands" / "0.npy") * (255 / 4095)).float())
    assert first.shape == (16, 16, 3)
    assert (first.min(), first.max()) == (0, 1), "a tenth of the range must be stretched to be seen"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "/none"], "/none: no such file or folder"),
        (["/none", "{images}"], "encoder: '/none': no such folder, and no such model of timm"),
        (["{run}", "{images}", "--compare", "vit_smal"], "--compare: 'vit_smal': no such folder"),
        (["{run}", "{few}"], "IMAGES: at least 4 readable images are needed; got 2; unreadable: "),
        (["{run}", "{images}", "--count", "3"], "3 is not in the range x>=4"),
        (["{run}", "{images}", "--out", "{file}/x"], "Not a directory"),
    ],
)
def test_errors(words: list[str], message: str, run: Path, image_folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for i, path in enumerate(sorted((image_folder / "disc").iterdir())[:2]):
        (few / f"{i}{path.suffix}").write_bytes(path.read_bytes())
    (few / "bad.jpg").write_text("no image")
    (tmp_path / "file").touch()
    names = {"run": run, "images": image_folder, "few": few, "file": tmp_path / "file"}
    done = CliRunner().invoke(main, ["inspect", *(w.format(**names) for w in words)])
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output


def test_too_few_images_are_refused_from_python(run: Path) -> None:
    with pytest.raises(UserError, match=f"images: at least {LEAST_IMAGES}; got 2"):
        inspection.inspect_encoder(run, ["x"], images=2)
