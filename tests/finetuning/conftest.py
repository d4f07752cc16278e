"""What the tests of fine-tuning begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

import mpp
from tests.conftest import pretrain_recipe


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained tiny ViT."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    mpp.pretrain(pretrain_recipe(shards, out))
    return out
