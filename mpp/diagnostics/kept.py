"""The pictures that a run kept of the same few held-out images, step by step. Read without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mpp.diagnostics.sheets import save_png, scaled, sheet, stacked
from mpp.errors import UserError
from mpp.history import read_run

FOLDER = "reconstructions"
"""Of a run: the same held-out images with the same masks, a PNG for each step that was kept."""
MOST_SHOWN = 8
"""Steps side by side in a strip."""
FRAME_MS, LAST_FRAME_MS = 500, 2000
KEY = "mpp"
"""Text chunk of the kept PNG files: what is in which tile."""
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}


class Kept(NamedTuple):
    """The pictures of one step."""

    step: int
    target: str
    panels: dict[str, list[Image.Image]]
    """Title -> tiles, one for each image"""


def read_kept(run: Path) -> list[Kept]:
    """What `keep` wrote, first step first; [] where there is nothing. A file that is not its own is passed over."""
    found = []
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
            found.append(Kept(int(about["step"]), str(about["target"]), panels))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
    return _alike(sorted(found, key=lambda k: k.step))


def _alike(found: list[Kept]) -> list[Kept]:
    """With as many images, and the panels, that all of them have: a resumed run may keep fewer than before."""
    if not found:
        return []
    titles = [t for t in found[-1].panels if all(t in k.panels for k in found)]
    rows = min(len(k.panels["original"]) for k in found)
    return [k._replace(panels={t: k.panels[t][:rows] for t in titles}) for k in found if rows]


def pasted(kept: Sequence[Kept]) -> list[str]:
    """The titles of the panels that are worth following through training."""
    return [title for title in kept[-1].panels if title.startswith("pasted")]


def spread(kept: Sequence[Kept], most: int) -> list[Kept]:
    """At most so many of the steps, the first and the last among them, more of the early ones: most happens there."""
    if len(kept) <= most:
        return list(kept)
    last = len(kept) - 1
    chosen = {round(last * (i / (most - 1)) ** 1.5) for i in range(most)}
    return [kept[i] for i in sorted(chosen)]


def strip(kept: Sequence[Kept], panel: str, most: int = MOST_SHOWN) -> Image.Image:
    """A row for each image: as it is, masked, then the panel at several steps."""
    shown = spread(kept, most)
    first = shown[0].panels
    fixed = [title for title in ("original", "masked", "target") if title in first]
    titles = [*fixed, *(f"step {k.step:,}" for k in shown)]
    rows = [
        [*(scaled(first[t][i]) for t in fixed), *(scaled(k.panels[panel][i]) for k in shown)]
        for i in range(len(first["original"]))
    ]
    borrowed = "" if panel == "pasted" else f", {panel}"
    return sheet(rows, titles, title=f"what is predicted of {shown[0].target}{borrowed}")


def frames(kept: Sequence[Kept]) -> list[Image.Image]:
    """One picture for each step, all of a size: a row for each image, all its panels side by side."""
    found = []
    for k in kept:
        titles = list(k.panels)
        rows = [[scaled(k.panels[t][i]) for t in titles] for i in range(len(k.panels["original"]))]
        found.append(sheet(rows, titles, title=f"step {k.step:,}"))
    return found


def through_training(run: str | Path, out: str | Path) -> Path:
    """A strip of steps (.png), or an animation (.gif, .webp). UserError where the run kept none."""
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
        raise UserError(f"--out {out}: allowed are .png, and of a run's own images .gif and .webp")
