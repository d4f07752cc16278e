"""Reconstructions as pictures: of any images by a run's checkpoint, and of the same few images through training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from mpp import checkpoint
from mpp.build import build_mask, build_model
from mpp.data.decode import centre_box, decode_crop
from mpp.data.images import evenly, images_of
from mpp.data.loader import draw_masks
from mpp.errors import BadImage, UserError
from mpp.model import Reconstruction
from mpp.recipe import PretrainRecipe, load_recipe

FOLDER = "reconstructions"
"""Of a run: the same held-out images with the same masks, a PNG for each step that was kept."""
MOST_KEPT = 12
"""Steps that are kept of a run, besides the untrained model."""
MOST_SHOWN = 8
"""Steps side by side in a strip."""
TILE_PX = 128
"""Small images are enlarged to about this, each pixel a square; large ones shrunk."""
GAP_PX = 6
FONT_PX = 13
FRAME_MS, LAST_FRAME_MS = 500, 2000
KEY = "mpp"
"""Text chunk of the kept PNG files: what is in which tile."""
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}


# ---- of images, by a checkpoint --------------------------------------------------------------------------------------


OF_A_FOLDER = 8
"""Images that are drawn, where a folder is named."""


def reconstruct(run: str | Path, images: Sequence[str], out: str | Path) -> Path:
    """Draw what the newest checkpoint of a pretraining run predicts for images; a PNG, a row for each.

    images: files; of a folder a few are taken, evenly. Without any: the run's own through
    training, as a strip (.png) or an animation (.gif, .webp).
    UserError where run or images cannot be read, or no target of the run has a picture.
    """
    if not images:
        return through_training(run, out)
    for name in images:
        if Path(out).exists() and Path(name).exists() and Path(out).samefile(name):
            raise UserError(f"--out {out}: is one of the images; give another file")
    images = [name for place in images for name in _images_of(place)]
    _png(out)
    recipe = load_recipe(Path(run) / "recipe.yaml", PretrainRecipe)
    path = checkpoint.newest(Path(run) / "checkpoints")
    if path is None:
        raise UserError(f"{run}: no checkpoint to reconstruct with")
    model, grid = build_model(recipe)
    checkpoint.load(path, model)
    model.eval()
    batch = torch.stack([_read(name, recipe) for name in images])
    units = draw_masks(build_mask(recipe), grid, 0.5, recipe.seed, range(len(images)))
    found = model.reconstruct(batch, units.hidden, units.noise, units.count)
    if not found:
        names = ", ".join(o.name for o in model.objectives)
        raise UserError(f"{run}: target {names}: has no picture; those with one: pixels, norm_pixels, colours, hog")
    blocks = []
    for drawn in found:
        rows = [[tile(p.images[i]) for p in drawn.panels] for i in range(len(images))]
        title = f"target {drawn.target}" if len(found) > 1 else None
        blocks.append(sheet(rows, [p.title for p in drawn.panels], title=title))
    return _save(_stacked(blocks), Path(out))


def _images_of(place: str) -> list[str]:
    """A file as it is; of a folder a few, evenly."""
    if not os.path.isdir(place):
        return [place]
    found = images_of([place])
    return [found[i] for i in evenly(len(found), OF_A_FOLDER)]


def _read(name: str, recipe: PretrainRecipe) -> Tensor:
    data = recipe.data
    try:
        return decode_crop(
            Path(name).read_bytes(),
            lambda w, h: centre_box(w, h, data.image_size),
            data.image_size,
            **data.decoding(),
        )
    except (OSError, BadImage) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


# ---- through training ------------------------------------------------------------------------------------------------


def kept_every(total_steps: int, measured_every: int) -> int:
    """Steps between two that are kept: a multiple of those between measurements, so that at most `MOST_KEPT` are."""
    return measured_every * max(-(-(total_steps // measured_every) // MOST_KEPT), 1)


def keep(run: Path, step: int, found: Sequence[Reconstruction]) -> None:
    """Write the pictures of the first target that has any: a grid of tiles, a row for each image."""
    if not found:
        return
    drawn = found[0]
    panels = [[_image(p.images[i]) for p in drawn.panels] for i in range(len(drawn.panels[0].images))]
    w, h = max(image.size for image in panels[0])  # glyphs are larger than the image they are of
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
        [*(_scaled(first[t][i]) for t in fixed), *(_scaled(k.panels[panel][i]) for k in shown)]
        for i in range(len(first["original"]))
    ]
    borrowed = "" if panel == "pasted" else f", {panel}"
    return sheet(rows, titles, title=f"what is predicted of {shown[0].target}{borrowed}")


def frames(kept: Sequence[Kept]) -> list[Image.Image]:
    """One picture for each step, all of a size: a row for each image, all its panels side by side."""
    found = []
    for k in kept:
        titles = list(k.panels)
        rows = [[_scaled(k.panels[t][i]) for t in titles] for i in range(len(k.panels["original"]))]
        found.append(sheet(rows, titles, title=f"step {k.step:,}"))
    return found


def through_training(run: str | Path, out: str | Path) -> Path:
    """A strip of steps (.png), or an animation (.gif, .webp). UserError where the run kept none."""
    load_recipe(Path(run) / "recipe.yaml", PretrainRecipe)  # says what it is otherwise
    kept = read_kept(Path(run))
    if not kept:
        raise UserError(
            f"{run}/{FOLDER}: no pictures kept while it trained (reconstruct_images: 0, or a target without pictures); "
            "give images: mpp reconstruct RUN IMAGE…"
        )
    out = Path(out)
    if out.suffix.lower() not in ANIMATIONS:
        _png(out)
        return _save(_stacked([strip(kept, panel) for panel in pasted(kept)]), out)
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


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _image(pixels: Tensor) -> Image.Image:
    """(C, h, w) in [0, 1] -> RGB."""
    array = (255 * pixels.float().cpu()).round().clamp(0, 255).byte()
    array = array[:3] if len(array) >= 3 else array[:1].expand(3, -1, -1)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def _scaled(image: Image.Image) -> Image.Image:
    """Enlarged so that its pixels show, or shrunk."""
    longest = max(image.size)
    factor = max(round(TILE_PX / longest), 1) if longest < 1.5 * TILE_PX else 1.5 * TILE_PX / longest
    size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)


def tile(pixels: Tensor) -> Image.Image:
    """(C, h, w) in [0, 1] -> a tile of a sheet."""
    return _scaled(_image(pixels))


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], *, title: str | None = None) -> Image.Image:
    """Tiles in columns with titles; tiles of one row that differ in size are brought to that of the first."""
    font = ImageFont.load_default(FONT_PX)
    w, h = rows[0][0].size
    wrapped = [_wrapped(text, w, font) for text in titles]
    header = max(text.count("\n") + 1 for text in wrapped) * (FONT_PX + 4) + GAP_PX
    above = FONT_PX + 2 * GAP_PX if title else 0
    width = len(titles) * (w + GAP_PX) + GAP_PX
    found = Image.new("RGB", (width, above + header + len(rows) * (h + GAP_PX)), "white")
    pen = ImageDraw.Draw(found)
    if title:
        pen.text((GAP_PX, GAP_PX), title, fill="black", font=font)
    for c, text in enumerate(wrapped):
        pen.multiline_text((GAP_PX + c * (w + GAP_PX), above + 2), text, fill="black", font=font, spacing=3)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            fitted = image if image.size == (w, h) else image.resize((w, h), Image.Resampling.LANCZOS)
            found.paste(fitted, (GAP_PX + c * (w + GAP_PX), above + header + r * (h + GAP_PX)))
    return found


def _wrapped(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Line breaks between words, where they would run into the next column."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _stacked(blocks: Sequence[Image.Image]) -> Image.Image:
    if len(blocks) == 1:
        return blocks[0]
    gap = 3 * GAP_PX
    height = sum(b.height for b in blocks) + gap * (len(blocks) - 1)
    found = Image.new("RGB", (max(b.width for b in blocks), height), "white")
    top = 0
    for block in blocks:
        found.paste(block, (0, top))
        top += block.height + gap
    return found


def _png(out: str | Path) -> None:
    suffix = Path(out).suffix.lower()
    if suffix in ANIMATIONS:
        raise UserError(
            f"--out {out}: an animation is of a run's own images through training; give no IMAGE, or a .png"
        )
    if suffix != ".png":
        raise UserError(f"--out {out}: allowed are .png, and of a run's own images .gif and .webp")


def _save(picture: Image.Image, out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out, format="PNG")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
    return out
