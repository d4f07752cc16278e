"""Make real photographs for the demonstration: small grey crops of the photographs inside scikit-image.

    python tools/demo_images.py OUT

This writes OUT/unlabeled/*.png, OUT/train/<photograph>/*.png and OUT/val/<photograph>/*.png. A photograph is used only
if its docstring in skimage.data states CC0 or public domain. Training crops (labeled or not) come from the left part of
a photograph, validation crops from the right part. There is a gap between, so no pixel is in both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from skimage.util import img_as_ubyte

# As skimage.data's docstrings state them; coins, immunohistochemistry and moon state neither and are not used.
LICENCES = {
    "astronaut": "public domain (NASA)",
    "brick": "CC0 (CC0Textures)",
    "camera": "CC0 (Lav Varshney)",
    "cell": "CC0 (Paul Müller et al.)",
    "chelsea": "CC0 (Stefan van der Walt)",
    "coffee": "CC0 (Rachel Michetti)",
    "grass": "CC0 (linolafett)",
    "gravel": "CC0 (CC0Textures)",
    "hubble_deep_field": "public domain (NASA)",
    "retina": "CC0 (Mikael Häggström)",
    "rocket": "public domain (SpaceX)",
}
CROP_PX = 32
SOURCE_PX = (40, 80)  # sides of the squares that are scaled down to CROP_PX, for textures at several scales
TRAIN_PART, VAL_PART = 0.62, 0.35  # fractions of the width, from the left and from the right
UNLABELED, TRAIN, VAL = 1000, 40, 60  # numbers of crops of each photograph


def crops(image: np.ndarray, left: int, right: int, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Return square crops of a grey image.

    Args:
        image: Grey image, (H, W).
        left: First column that crops may have.
        right: Column after the last that crops may have.
        count: Number of crops. Each is scaled to CROP_PX.
        rng: Source of randomness.
    """
    found = []
    for _ in range(count):
        side = int(rng.integers(SOURCE_PX[0], min(SOURCE_PX[1], right - left, len(image)) + 1))
        top = int(rng.integers(0, len(image) - side + 1))
        start = int(rng.integers(left, right - side + 1))
        square = Image.fromarray(image[top : top + side, start : start + side])
        found.append(square.resize((CROP_PX, CROP_PX), Image.Resampling.LANCZOS))
    return found


def main(out: Path) -> None:
    rng = np.random.default_rng(0)
    for name in LICENCES:
        photograph = Image.fromarray(img_as_ubyte(getattr(data, name)())).convert("L")
        image = np.asarray(photograph)
        width = image.shape[1]
        train, val = (0, int(width * TRAIN_PART)), (int(width * (1 - VAL_PART)), width)
        for folder, (left, right), count in (
            (out / "unlabeled", train, UNLABELED),
            (out / "train" / name, train, TRAIN),
            (out / "val" / name, val, VAL),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            for i, crop in enumerate(crops(image, left, right, count, rng)):
                crop.save(folder / f"{name}-{i:04d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
