"""Arrange pictures side by side with titles, with Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mpp.errors import UserError

TILE_PX = 128
"""Approximate longer side of a tile. Small images are enlarged without smoothing.

Images of 1.5 times this or more are shrunk to that size."""
GAP_PX = 6
FONT_PX = 13


def scaled(image: Image.Image) -> Image.Image:
    """Return an image scaled to a tile: enlarged without smoothing, or shrunk."""
    longest = max(image.size)
    factor = max(round(TILE_PX / longest), 1) if longest < 1.5 * TILE_PX else 1.5 * TILE_PX / longest
    size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], *, title: str | None = None) -> Image.Image:
    """Draw rows of tiles in columns with titles. All tiles are resized to the size of the first.

    Args:
        rows: Rows of tiles, one tile for each column.
        titles: Titles of the columns.
        title: Title of the sheet. None means no title.
    """
    font = ImageFont.load_default(FONT_PX)
    w, h = rows[0][0].size
    wrapped = [_wrapped(text, w, font) for text in titles]
    header = max(text.count("\n") + 1 for text in wrapped) * (FONT_PX + 4) + GAP_PX
    above = FONT_PX + 2 * GAP_PX if title else 0
    width = len(titles) * (w + GAP_PX) + GAP_PX
    picture = Image.new("RGB", (width, above + header + len(rows) * (h + GAP_PX)), "white")
    pen = ImageDraw.Draw(picture)
    if title:
        pen.text((GAP_PX, GAP_PX), title, fill="black", font=font)
    for c, text in enumerate(wrapped):
        pen.multiline_text((GAP_PX + c * (w + GAP_PX), above + 2), text, fill="black", font=font, spacing=3)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            fitted = image if image.size == (w, h) else image.resize((w, h), Image.Resampling.LANCZOS)
            picture.paste(fitted, (GAP_PX + c * (w + GAP_PX), above + header + r * (h + GAP_PX)))
    return picture


def _wrapped(text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return text with line breaks between words, so that it fits into its column."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def stacked(blocks: Sequence[Image.Image]) -> Image.Image:
    if len(blocks) == 1:
        return blocks[0]
    gap = 3 * GAP_PX
    height = sum(b.height for b in blocks) + gap * (len(blocks) - 1)
    picture = Image.new("RGB", (max(b.width for b in blocks), height), "white")
    top = 0
    for block in blocks:
        picture.paste(block, (0, top))
        top += block.height + gap
    return picture


def save_png(picture: Image.Image, out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out, format="PNG")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
    return out
