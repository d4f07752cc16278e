"""The demonstration's photographs state a free licence, and training and validation share no pixel."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from skimage import data

from tests.conftest import tool


def test_every_photograph_states_its_licence_and_is_inside_the_package() -> None:
    for name in tool("demo_images").LICENCES:
        assert re.search(r"CC0|public\s+domain|Public\s+Domain", getattr(data, name).__doc__), name
        folder = Path(data.__file__).parent
        assert list(folder.glob(f"{name}*")), f"{name} would be downloaded"


def test_training_and_validation_share_no_pixel() -> None:
    module = tool("demo_images")
    assert module.TRAIN_PART + module.VAL_PART < 1
    image = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    rng = np.random.default_rng(0)
    left = module.crops(image, 0, int(200 * module.TRAIN_PART), 50, rng)
    right = module.crops(image, int(200 * (1 - module.VAL_PART)), 200, 50, rng)
    assert max(np.asarray(c).max() for c in left) < min(np.asarray(c).min() for c in right)
