"""The README's pictures, from the demonstration's report.

    make demo
    python tools/readme_pictures.py runs/demo/pretrain docs

Reconstructions through training of the held-out images with most contrast, and features as colours. All images are
crops of photographs that may be shown (see tools/demo_images.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mpp.runs.history import INSPECTION
from mpp.runs.pictures import Kept, pasted, read_kept, strip

ROWS = 3
STEPS = 5


def most_contrast(kept: list[Kept]) -> list[Kept]:
    """The same, of the images whose original varies most."""
    originals = [np.asarray(image.convert("L"), dtype=float) for image in kept[0].panels["original"]]
    chosen = sorted(np.argsort([-image.std() for image in originals])[:ROWS].tolist())
    return [k._replace(panels={title: [tiles[i] for i in chosen] for title, tiles in k.panels.items()}) for k in kept]


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(path, optimize=True)
    print(f"{path}: {picture.width}×{picture.height}, {path.stat().st_size // 1000} kB")


def main(run: Path, out: Path) -> None:
    kept = read_kept(run)
    if not kept:
        sys.exit(f"{run}: no reconstructions in it; make demo writes them")
    shown = most_contrast(kept)
    save(strip(shown, pasted(shown)[-1], most=STEPS), out / "reconstructions.png")
    with Image.open(run / INSPECTION / "colours.png") as picture:
        save(picture, out / "colours.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
