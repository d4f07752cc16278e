"""Embed pictures in a report: limited in size, and SVG files only if they are harmless drawings."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from mpp.drawing import plots

if TYPE_CHECKING:
    from mpp.drawing.plots import Figure

LEAST_SCALE = 0.3
MOST_SVG_BYTES = 400_000
"""A larger SVG file is replaced by its PNG."""
SMALL_PNG_BYTES = 150_000
"""Largest PNG that stays a PNG, which is lossless; a larger one becomes WebP."""
WEBP_QUALITY = 85


@dataclass
class Picture:
    """A picture as HTML, with an alternative text for readers who cannot see it."""

    html: Markup
    alt: str
    caption: str = ""
    title: str = ""
    wide: bool = False
    """Whether the picture has the full width of the page, and scrolls on a phone instead of being shrunk."""


class Pictures:
    """Maker of pictures for one page.

    Args:
        scale: Factor by which pictures made of pixels are shrunk. Below 1, no SVG file is embedded.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self._drawn = 0

    def plot(self, figure: Figure, alt: str, **more: Any) -> Picture:
        """Embed a matplotlib figure as SVG."""
        self._drawn += 1
        return Picture(Markup(plots.svg(figure, f"p{self._drawn}")), alt, **more)

    def pixels(self, image: Image.Image, alt: str, **more: Any) -> Picture:
        if self.scale < 1:
            size = (max(round(image.width * self.scale), 1), max(round(image.height * self.scale), 1))
            image = image.resize(size, Image.Resampling.LANCZOS)
        data, kind = _encoded(image, "PNG"), "png"
        if len(data) > SMALL_PNG_BYTES:
            data, kind = _encoded(image, "WEBP", quality=WEBP_QUALITY), "webp"
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        html = Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(source, *image.size, alt)
        return Picture(html, alt, **more)

    def file(self, path: Path, alt: str, **more: Any) -> Picture | None:
        """Embed a PNG file of a run, or the SVG file of the same name if it may be used.

        Args:
            path: The PNG file.
            alt: Alternative text.
            **more: Other fields of `Picture`.

        Returns:
            The picture, or None if it cannot be read.
        """
        drawing = path.with_suffix(".svg")
        try:
            if self.scale == 1 and drawing.exists() and drawing.stat().st_size <= MOST_SVG_BYTES:
                text = drawing.read_text(encoding="utf-8")
                if plots.is_own_svg(text):
                    return Picture(Markup(text), alt, **more)
            with Image.open(path, formats=("PNG",)) as image:
                return self.pixels(image.convert("RGB"), alt, **more)
        except (OSError, ValueError, Image.DecompressionBombError):
            return None


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
