"""tools/docs_pictures.py draws every picture that the README and the guides show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, tool

docs_pictures = tool("docs_pictures")


@pytest.mark.slow
def test_it_draws_the_pictures_that_pages_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_pictures, "TRAINED", 6)
    small = {"data": {**docs_pictures.RECIPE["data"], "held_out": 8}, "encoder": {"name": "vit_tiny_patch16_224"}}
    small["encoder"]["args"] = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    optim = {**docs_pictures.RECIPE["optim"], "global_batch_size": 8}
    monkeypatch.setattr(docs_pictures, "RECIPE", {**docs_pictures.RECIPE, **small, "optim": optim})
    docs_pictures.main([str(tmp_path / "out"), "--run", str(tmp_path / "run"), "--steps", "2"])
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {Path(name).name for page in pages for name in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", page.read_text())}
    assert drawn == shown - {"bench.png"}, "each is drawn and shown; make bench draws its own"
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 50
