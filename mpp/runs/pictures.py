"""Write and read the reconstructions that a run keeps of a few held-out images. Reading does not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, PngImagePlugin

from mpp.drawing.sheets import save_png, scaled, sheet, stacked
from mpp.errors import UserError
from mpp.runs.history import read_run

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "reconstructions"
"""Folder of a run with one PNG for each kept step. All show the same held-out images with the same masks."""
MOST_SHOWN = 8
"""Most steps side by side in a strip."""
FRAME_MS, LAST_FRAME_MS = 500, 2000
KEY = "mpp"
"""Text chunk of the kept PNG files, which describes their tiles."""
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}


BORROWED = "pasted, own statistics borrowed"
"""Panel drawn with the mean and contrast of the hidden patches, which the model neither saw nor predicted."""
GREY = 0.5
"""Value that fills the hidden part of "masked" and the visible part of "predicted"."""


class Panel(NamedTuple):
    """A title, and one picture of that kind for each image."""

    title: str
    images: Tensor
    """(B, C, h, w) or (B, 1, h, w) in [0, 1]."""


class Reconstruction(NamedTuple):
    """Pictures of the predictions of one target, next to the target itself."""

    target: str
    panels: list[Panel]
    """Panels: original, masked, target (if it looks different from the image), predicted, pasted into the visible part.

    If pixels can only be drawn with statistics of the hidden patches, there is one more panel, `BORROWED`."""


class Kept(NamedTuple):
    """The pictures of one step."""

    step: int
    target: str
    panels: dict[str, list[Image.Image]]
    """Title of a panel -> tiles, one for each image"""


def read_kept(run: Path) -> list[Kept]:
    """Read the pictures that `keep` wrote, in the order of steps; [] if there are none. Other files are skipped."""
    kept = []
    for path in sorted((run / FOLDER).glob("step-*.png")):
        try:
            with Image.open(path) as grid:
                about = json.loads(grid.text[KEY])  # type: ignore[attr-defined]  # PNG files have it
                w, h = map(int, about["tile_px"])
                if min(w, h) < 1 or not {"original", "masked", "pasted"} <= set(about["titles"]):
                    continue
                grid.load()
                panels = {
                    title: [grid.crop((c * w, r * h, (c + 1) * w, (r + 1) * h)) for r in range(grid.height // h)]
                    for c, title in enumerate(about["titles"])
                }
            kept.append(Kept(int(about["step"]), str(about["target"]), panels))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
    return _alike(sorted(kept, key=lambda k: k.step))


def _alike(kept: list[Kept]) -> list[Kept]:
    """Reduce all steps to the images and panels that they have in common: a resumed run may keep fewer than before."""
    if not kept:
        return []
    titles = [t for t in kept[-1].panels if all(t in k.panels for k in kept)]
    rows = min(len(k.panels["original"]) for k in kept)
    return [k._replace(panels={t: k.panels[t][:rows] for t in titles}) for k in kept if rows]


def pasted(kept: Sequence[Kept]) -> list[str]:
    """Return the titles of the panels that are shown at several steps."""
    return [title for title in kept[-1].panels if title.startswith("pasted")]


def spread(kept: Sequence[Kept], most: int) -> list[Kept]:
    """Choose at most `most` steps, including the first and the last. Early steps are denser, since they change most."""
    if len(kept) <= most:
        return list(kept)
    last = len(kept) - 1
    chosen = {round(last * (i / (most - 1)) ** 1.5) for i in range(most)}
    return [kept[i] for i in sorted(chosen)]


def strip(kept: Sequence[Kept], panel: str, most: int = MOST_SHOWN) -> Image.Image:
    """Draw a row for each image: the original, the masked image, then the panel at several steps.

    Args:
        kept: Kept steps, in order.
        panel: Title of the panel that is shown at several steps.
        most: Most steps that are shown.
    """
    shown = spread(kept, most)
    first = shown[0].panels
    fixed = [title for title in ("original", "masked", "target") if title in first]
    titles = [*fixed, *(f"step {k.step:,}" for k in shown)]
    rows = [
        [*(scaled(first[t][i]) for t in fixed), *(scaled(k.panels[panel][i]) for k in shown)]
        for i in range(len(first["original"]))
    ]
    borrowed = "" if panel == "pasted" else f", {panel}"
    return sheet(rows, titles, title=f"target {shown[0].target}{borrowed}")


def frames(kept: Sequence[Kept]) -> list[Image.Image]:
    """Draw a picture of each step, all of the same size: a row for each image, with its panels side by side."""
    images = []
    for k in kept:
        titles = list(k.panels)
        rows = [[scaled(k.panels[t][i]) for t in titles] for i in range(len(k.panels["original"]))]
        images.append(sheet(rows, titles, title=f"step {k.step:,}"))
    return images


def through_training(run: str | Path, out: str | Path) -> Path:
    """Draw the kept steps of a run as a strip (.png) or an animation (.gif, .webp).

    Args:
        run: Folder of a pretraining run.
        out: File to write.

    Returns:
        The file.

    Raises:
        UserError: If it is not a pretraining run, the run kept no pictures, or the file cannot be written.
    """
    if (job := read_run(run).job) != "pretrain":
        raise UserError(f"{run}: a run of `mpp {job}`; only pretraining keeps reconstructions")
    kept = read_kept(Path(run))
    if not kept:
        raise UserError(
            f"{run}/{FOLDER}: no pictures kept while it trained (reconstruct_images: 0, or a target without pictures); "
            "give images: mpp reconstruct RUN IMAGE…"
        )
    out = Path(out)
    if out.suffix.lower() not in ANIMATIONS:
        check_png(out)
        return save_png(stacked([strip(kept, panel) for panel in pasted(kept)]), out)
    first, *rest = frames(kept)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        first.save(
            out,
            format=ANIMATIONS[out.suffix.lower()],
            save_all=True,
            append_images=rest,
            duration=[FRAME_MS] * len(rest) + [LAST_FRAME_MS],
            loop=0,
        )
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
    return out


def check_png(out: str | Path) -> None:
    suffix = Path(out).suffix.lower()
    if suffix in ANIMATIONS:
        raise UserError(
            f"--out {out}: an animation is of a run's own images through training; give no IMAGE, or a .png"
        )
    if suffix != ".png":
        raise UserError(f"--out {out}: expected .png, or .gif or .webp of a run's own images")


MOST_KEPT = 12
"""Most steps that are kept of a run, in addition to the untrained model."""


def kept_every(total_steps: int, measured_every: int) -> int:
    """Return the number of steps between kept ones: the least multiple of `measured_every` with at most `MOST_KEPT`."""
    return measured_every * max(-(-(total_steps // measured_every) // MOST_KEPT), 1)


def keep(run: Path, step: int, reconstructions: Sequence[Reconstruction]) -> None:
    """Write the pictures of the first target that has any, as a grid of tiles with a row for each image."""
    if not reconstructions:
        return
    drawn = reconstructions[0]
    panels = [[_image(p.images[i]) for p in drawn.panels] for i in range(len(drawn.panels[0].images))]
    w, h = max(image.size for image in panels[0])  # pictures of glyphs have more pixels than the image
    grid = Image.new("RGB", (w * len(panels[0]), h * len(panels)))
    for r, row in enumerate(panels):
        for c, image in enumerate(row):
            grid.paste(image.resize((w, h), Image.Resampling.NEAREST), (c * w, r * h))
    about = {"step": step, "target": drawn.target, "titles": [p.title for p in drawn.panels], "tile_px": [w, h]}
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps(about))
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / "step.tmp"
    grid.save(temporary, format="PNG", pnginfo=text)
    temporary.replace(folder / f"step-{step:08d}.png")


def _image(pixels: Tensor) -> Image.Image:
    """Convert (C, h, w) in [0, 1] to an RGB image."""
    array = (255 * pixels.float().cpu()).round().clamp(0, 255).byte()
    array = array[:3] if len(array) >= 3 else array[:1].expand(3, -1, -1)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def tile(pixels: Tensor) -> Image.Image:
    """Convert (C, h, w) in [0, 1] to a tile of a sheet."""
    return scaled(_image(pixels))
