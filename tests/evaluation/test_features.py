"""Features by layer are timm's for every family, and files hold those of the readable images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpp.encoders.creation import create_timm_model
from mpp.encoders.support import FAMILIES, Family
from mpp.errors import UserError
from mpp.evaluation.features import EncoderReader, PixelReader, Place, read_table
from mpp.objective.contract import ContractCase

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
CPU = torch.device("cpu")


def tiny(**args: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, **args}
    return create_timm_model("vit_tiny_patch16_224", image_size=(16, 16), in_chans=3, pretrained=False, args=sizes)


def some_images(n: int = 2, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.family)
def test_every_family(family: Family) -> None:
    subject = ContractCase.of(family)
    torch.manual_seed(0)
    plain = subject.plain().eval()
    reader = EncoderReader(plain, None, MEAN, STD).train()
    images = some_images(2, subject.image_size)
    found = reader(images, tokens=True)
    assert reader(images).tokens == {}, "tokens are many, so they are returned on request only"
    x = (images.float() - 255 * torch.tensor(MEAN).view(-1, 1, 1)) / (255 * torch.tensor(STD).view(-1, 1, 1))
    with torch.no_grad():
        assert torch.equal(found.pooled[Place("out", "own")], plain(x)), "expected what num_classes=0 returns"
        last = plain.forward_intermediates(x, norm=False, output_fmt="NCHW", intermediates_only=True)[-1]
    depth = len(plain.feature_info)
    assert list(found.tokens) == [str(i) for i in range(1, depth + 1)]
    assert torch.equal(found.tokens[str(depth)], last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.pooled[Place(str(depth), "mean")], found.tokens[str(depth)].mean(1))
    has_token = Place(str(depth), "token") in found.pooled
    assert has_token == (getattr(plain, "cls_token", None) is not None)
    assert all(f.shape[0] == 2 and f.ndim == 2 and not f.requires_grad for f in found.pooled.values())


def test_layers_are_chosen_by_number() -> None:
    model = tiny()
    every = EncoderReader(model, None, MEAN, STD)(some_images()).pooled
    two = EncoderReader(model, (3, 1, 3), MEAN, STD)(some_images()).pooled
    assert [p.layer for p in two if p.pool == "mean"] == ["1", "3"]
    for place, features in two.items():
        assert torch.equal(features, every[place])
    with pytest.raises(UserError, match=r"layers: 4: VisionTransformer has 1 to 3"):
        EncoderReader(model, (4,), MEAN, STD)


def test_the_class_token_is_that_of_its_layer() -> None:
    model = tiny().eval()
    caught: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda m, a, out: caught.append(out[:, 0]))
    found = EncoderReader(model, (2,), MEAN, STD)(some_images()).pooled
    assert torch.equal(found[Place("2", "token")], caught[0])


def test_pixels_are_shrunk() -> None:
    small, large = some_images(2, (16, 12)), some_images(2, (64, 96))
    found = PixelReader()(small).pooled[Place("pixels", "own")]
    torch.testing.assert_close(found, small.float().flatten(1) / 255)
    assert PixelReader()(large).pooled[Place("pixels", "own")].shape == (2, 3 * 32 * 32)


def batch(first: int, n: int, bad: tuple[int, ...] = ()) -> Any:
    labels = torch.arange(first, first + n)
    images = labels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).to(torch.uint8)
    readable = torch.tensor([int(i) not in bad for i in labels])
    return SimpleNamespace(images=images, labels=labels, bad=[f"image {n}" for n in bad], readable=readable)


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    parts = [batch(0, 4, bad=(1,)), batch(4, 4, bad=(4, 6)), batch(8, 2)]
    table = read_table(PixelReader(), parts, 10, 5, tmp_path / "f", CPU)
    assert table.labels.tolist() == [0, 2, 3, 5, 7, 8, 9]
    assert table.first == 3, "two of the first five images cannot be read"
    features = table.features[Place("pixels", "own")]
    np.testing.assert_allclose(features[:, 0] * 255, table.labels, rtol=1e-6)
    assert isinstance(features, np.memmap), "features must stay on the disk"


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.evaluation.features.shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"the features take 0\.0 GB, 0\.0 GB are free"):
        read_table(PixelReader(), [batch(0, 4)], 4, 2, tmp_path / "f", CPU)
