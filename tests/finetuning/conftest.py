"""Fixtures of the tests of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest

import mpp
from tests.conftest import pretrain_recipe


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that pretrained a tiny ViT."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    mpp.pretrain(pretrain_recipe(shards, out))
    return out
