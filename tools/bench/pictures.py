"""Write JPEGs of the sizes that the input benchmarks read, from photographs inside scikit-image.

    python tools/bench/pictures.py OUT

This writes OUT/<size>/photographs/*.jpg and OUT/<size>-shards/*.tar. The pictures are crops of the photographs in
colour, scaled, with some sensor noise. Without noise, enlarged crops would compress better than a camera's pictures.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

import mpp.data.shards.pack

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
"""Photographs in colour, CC0 or public domain (tools/demo_images.py has the sources)."""
SIZES = {"32px": (32, 32, 2000), "375x500": (500, 375, 200), "3000px": (4000, 3000, 12)}
"""Width, height and number of pictures, by name."""
QUALITY = 90
NOISE = 3.0
"""Standard deviation of the noise of a pixel (a guess)."""


def picture(photograph: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return a random crop of the right aspect, scaled. It is at least half as wide as the photograph allows."""
    most = min(photograph.width, photograph.height * width / height)
    w = float(rng.uniform(0.5, 1.0)) * most
    h = w * height / width
    left, top = rng.uniform(0, photograph.width - w), rng.uniform(0, photograph.height - h)
    scaled = photograph.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    noisy = np.asarray(scaled, np.float32) + rng.normal(0, NOISE, (height, width, 3)).astype(np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def labeled(out: Path, per_class: int = 8) -> tuple[Path, Path]:
    """Return folders of labeled JPEGs of 375×500 to train and validate on: two classes, links to files of `main`."""
    if not (out / "375x500").exists():
        main(out, only=("375x500",))
    made = sorted((out / "375x500" / "photographs").glob("*.jpg"))
    folders = out / "labeled" / "train", out / "labeled" / "val"
    for number, folder in enumerate(f / name for f in folders for name in ("a", "b")):
        folder.mkdir(parents=True, exist_ok=True)
        for path in made[number * per_class : (number + 1) * per_class]:
            link = folder / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    return folders


def main(out: Path, only: Collection[str] = tuple(SIZES), copies: int = 1) -> None:
    """Write pictures and shards.

    Args:
        out: Folder to write to.
        only: Names of the sizes to make.
        copies: Number of equal files for each picture.
    """
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    for size in only:
        width, height, count = SIZES[size]
        folder = out / size / "photographs"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            made = picture(photographs[i % len(photographs)], width, height, rng)
            made.save(folder / f"{i:05d}.jpg", quality=QUALITY)
            for copy in range(1, copies):
                shutil.copy(folder / f"{i:05d}.jpg", folder / f"{i:05d}-{copy}.jpg")
        mpp.data.shards.pack.pack(
            str(out / size), str(out / f"{size}-shards"), images_per_shard=max(count * copies // 4, 1)
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
