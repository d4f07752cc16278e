"""Draw plots, as PNG files or as SVG for the report. In SVG, text and axes take the colour of the page's text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar
from xml.etree import ElementTree

import numpy as np

from mpp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

NAMED_CLASSES = 40
"""Most classes for which a confusion matrix is drawn with names and numbers."""
INK = "#1f2429"
"""Colour of text and axes. Nothing else has it, so that `svg` can replace it by the page's text colour."""
COLOURS = ("#2f81f7", "#d1730c", "#2da44e", "#bf3989", "#8250df", "#b08800", "#1b9aaa", "#cf222e")
"""Colours of lines. All but yellow have a contrast of at least 3:1 on white and on the dark page (WCAG 2.1, 1.4.11)."""
MARKERS = 40
"""Most points of a line that is drawn with markers."""

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def themed() -> Iterator[None]:
    """Apply the style of all plots to matplotlib within the context."""
    import matplotlib  # imported here because it takes half a second
    from cycler import cycler

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    rc: Any = dict.fromkeys(ink, INK)
    rc |= {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    rc |= {"axes.prop_cycle": cycler(color=COLOURS), "legend.framealpha": 0.0, "legend.fontsize": "small"}
    rc |= {"axes.facecolor": "none", "lines.linewidth": 1.6, "lines.markersize": 3.5, "svg.fonttype": "none"}
    with matplotlib.rc_context(rc):
        yield


def drawing(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that draws, so that it runs within `themed`."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with themed():
            return function(*args, **kwargs)

    return inside


class Line(NamedTuple):
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half_width: Sequence[float] | None = None
    """Half-widths of intervals around y; None means no intervals."""
    dashed: bool = False


class Dots(NamedTuple):
    """Points that are not joined by a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Level(NamedTuple):
    """A horizontal line."""

    name: str
    y: float


@drawing
def lines(
    panels: Mapping[str, Sequence[Line | Dots | Level]],
    *,
    xlabel: str | Sequence[str],
    ylabel: str = "",
    log_x: bool = False,
    log_y: bool = False,
    limits: Mapping[str, tuple[float, float | None]] | None = None,
    log_y_of: Sequence[str] = (),
    shared: bool = True,
    width: float = 4.2,
    height: float = 3.8,
    columns: int | None = None,
) -> Figure:
    """Draw panels side by side, each with its title.

    Args:
        panels: Content of each panel, by its title.
        xlabel: Label of the x axis of all panels, or one label for each panel.
        ylabel: Label of the y axis of the first panel.
        log_x: Whether x is logarithmic, with ticks only at the points of lines.
        log_y: Whether y is logarithmic in all panels.
        limits: Lowest and highest y of a panel, by its title. None as the highest means that it follows the data.
        log_y_of: Titles of panels in which y is logarithmic.
        shared: Whether all panels share one y scale.
        width: Width of a panel in inches.
        height: Height of a panel in inches.
        columns: Panels in a row. None means all panels.
    """
    from matplotlib.figure import Figure

    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns + (1 if columns > 1 else 0), height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=shared).ravel()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    named = [xlabel] * len(panels) if isinstance(xlabel, str) else list(xlabel)
    for axis, name, (title, marks) in zip(axes, named, panels.items(), strict=False):
        for mark in marks:
            if isinstance(mark, Level):
                axis.axhline(mark.y, label=_as_it_is(mark.name), linestyle=":", color="grey")
                continue
            if isinstance(mark, Dots):
                axis.plot(mark.x, mark.y, "o", label=_as_it_is(mark.name), markersize=3, alpha=0.6)
                continue
            style: Any = {"linestyle": "--" if mark.dashed else "-", "label": _as_it_is(mark.name)}
            style["marker"] = "o" if len(mark.x) <= MARKERS else None
            if mark.half_width is not None:
                axis.errorbar(mark.x, mark.y, mark.half_width, capsize=3, **style)
            else:
                axis.plot(mark.x, mark.y, **style)
        if log_x:
            axis.set_xscale("log")
            ticks = sorted({x for mark in marks if isinstance(mark, Line) for x in mark.x})
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        elif all(float(x).is_integer() for mark in marks if not isinstance(mark, Level) for x in mark.x):
            axis.xaxis.get_major_locator().set_params(integer=True)
        if log_y or title in log_y_of:
            axis.set_yscale("log")
        axis.set_title(_as_it_is(title))
        axis.set_xlabel(name)
        if limits and title in limits:
            axis.set_ylim(*limits[title])
        axis.grid(alpha=0.3)
        if any(mark.name for mark in marks):
            axis.legend()
    axes[0].set_ylabel(ylabel)
    return figure


def draw(
    panels: Mapping[str, Sequence[Line | Level]], out: Path, *, xlabel: str, ylabel: str, log_x: bool = False
) -> None:
    """Draw panels with `lines` and write them as a PNG.

    Args:
        panels: Content of each panel, by its title.
        out: File to write.
        xlabel: Label of the x axes.
        ylabel: Label of the y axis of the first panel.
        log_x: Whether x is logarithmic.

    Raises:
        UserError: If `out` cannot be written.
    """
    save(lines(panels, xlabel=xlabel, ylabel=ylabel, log_x=log_x), out)


@drawing
def confusion(counts: np.ndarray, classes: Sequence[str], out: Path) -> None:
    """Draw a confusion matrix, coloured by the share of each true class.

    Args:
        counts: (classes, classes) number of images, by true and predicted class.
        classes: Names of the classes.
        out: PNG file to write.

    Raises:
        UserError: If `out` cannot be written.
    """
    from matplotlib.figure import Figure

    n = len(classes)
    side = min(max(3.5, 0.35 * n), 16)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axis, label="share of the true class")
    if n <= NAMED_CLASSES:
        axis.set_xticks(range(n), [_as_it_is(c) for c in classes], rotation=90)
        axis.set_yticks(range(n), [_as_it_is(c) for c in classes])
        for i, j in np.argwhere(counts):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axis.text(j, i, counts[i, j], ha="center", va="center", fontsize="x-small", color=colour)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    save(figure, out)


class Heat(NamedTuple):
    """A matrix that is drawn as colours."""

    title: str
    values: np.ndarray
    xlabel: str = ""
    ylabel: str = ""
    origin: str = "lower"
    """Place of the first row, "lower" or "upper"."""


@drawing
def heats(panels: Sequence[Heat], *, low: float, high: float, label: str, columns: int | None = None) -> Figure:
    """Draw matrices side by side on a common scale.

    Args:
        panels: The matrices.
        low: Lowest value of the scale.
        high: Highest value of the scale.
        label: Label of the scale.
        columns: Panels in a row. None means all panels.
    """
    from matplotlib.figure import Figure

    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.9, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    shown: Any = None
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes, panels, strict=False):
        rows_of, columns_of = panel.values.shape
        extent = (0.5, columns_of + 0.5, 0.5, rows_of + 0.5)
        shown = axis.imshow(
            panel.values, vmin=low, vmax=high, origin=panel.origin, extent=extent, aspect="auto", cmap="magma",
            interpolation="nearest",
        )  # fmt: skip
        axis.set_title(_as_it_is(panel.title))
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
        for side in (axis.xaxis, axis.yaxis):
            side.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=axes.tolist(), label=label, shrink=0.9)
    return figure


class Picture(NamedTuple):
    """One picture in a grid of small pictures."""

    pixels: np.ndarray
    """(h, w, 3) colours in [0, 1], or (h, w) values"""
    title: str = ""
    over: np.ndarray | None = None
    """(h', w') values, drawn over the picture as colours"""
    at: tuple[float, float] | None = None
    """(row, column) of a marked place, in [0, 1]"""


@drawing
def pictures(
    rows: Sequence[Sequence[Picture]],
    *,
    title: str,
    low: float | None = None,
    high: float | None = None,
    side: float = 1.25,
) -> Figure:
    """Draw a grid of small pictures.

    Args:
        rows: Rows of pictures.
        title: Title of the grid.
        low: Lowest value of the common scale. None means that each picture has its own scale.
        high: Highest value of the common scale. None means that each picture has its own scale.
        side: Side of each picture in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = max(len(row) for row in rows)
    title_room = 0.2 * sum(any(p.title for p in row) for row in rows)
    figure = Figure(figsize=(side * columns + 0.1, side * len(rows) + title_room + 0.4))
    figure.suptitle(_as_it_is(title), fontsize=9)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for r, row in enumerate(rows):
        for axis, picture in zip(axes[r], row, strict=False):
            h, w = picture.pixels.shape[:2]
            box = (0, w, h, 0)
            scale: Any = {"vmin": low, "vmax": high, "cmap": "magma", "interpolation": "nearest", "extent": box}
            axis.imshow(picture.pixels, **scale)
            if picture.over is not None:
                axis.imshow(picture.over, **{**scale, "alpha": 0.65})
            if picture.at is not None:
                axis.plot(picture.at[1] * w, picture.at[0] * h, marker="x", color="#39ff88", markersize=5)
            if picture.title:
                axis.set_title(_as_it_is(picture.title), fontsize="x-small", pad=2)
    return figure


@drawing
def thumbnails(at: np.ndarray, images: Sequence[np.ndarray]) -> Figure:
    """Draw small images at their places in a plane, without axes.

    Args:
        at: (n, 2) places.
        images: (h, w, 3) images in [0, 1].
    """
    from matplotlib.figure import Figure
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    side_in = min(max(0.45 * len(images) ** 0.5, 4.0), 8.0)
    figure = Figure(figsize=(side_in, side_in))
    axis = figure.add_axes((0.05, 0.05, 0.9, 0.9))
    axis.axis("off")
    axis.set_xlim(at[:, 0].min(), at[:, 0].max())
    axis.set_ylim(at[:, 1].min(), at[:, 1].max())
    for place, image in zip(at, images, strict=True):
        axis.add_artist(AnnotationBbox(OffsetImage(image, zoom=0.6), place, frameon=False, pad=0))
    return figure


@drawing
def gallery(
    pictures: Sequence[tuple[Tensor, str]], out: Path, legend: Sequence[tuple[str, Sequence[int]]] = ()
) -> None:
    """Draw images with captions.

    Args:
        pictures: (C, H, W) uint8 images with their captions.
        out: PNG file to write.
        legend: Names with their RGB colours, 0 to 255.

    Raises:
        UserError: If `out` cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(pictures), 6)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.8 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (pixels, caption) in zip(axes, pictures, strict=False):
        array = pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy()
        axis.imshow(array, cmap="gray", vmin=0, vmax=255)
        axis.set_title(_as_it_is(caption), fontsize="x-small")
    if legend:
        patches = [Patch(color=f"#{r:02x}{g:02x}{b:02x}", label=_as_it_is(name)) for name, (r, g, b) in legend]
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize="x-small", frameon=False)
    save(figure, out)


def _as_it_is(text: str) -> str:
    """Escape dollar signs, which would start a formula in matplotlib, and replace characters that cannot be encoded."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()


def save(figure: Figure, out: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        UserError: If `out` cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element with a transparent background and the page's text colour.

    Args:
        figure: A matplotlib figure.
        name: Prefix of the element's ids. It must differ between the plots of a page.
    """
    buffer = io.StringIO()
    with themed():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would style the whole page
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    style = f"max-width:{float(width) * 1.35:.0f}px;stroke-linejoin:round;stroke-linecap:butt"
    opening = f'<svg viewBox="0 0 {width} {height}" style="{style}" aria-hidden="true"'
    opening += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return opening + text[text.index(">") :].strip()


DRAWN = frozenset({"svg", "g", "path", "defs", "clipPath", "rect", "use", "text", "tspan", "image"})
"""Elements that matplotlib's SVG files consist of."""
INSIDE = ("#", "data:image/png;base64,")


def is_own_svg(text: str) -> bool:
    """Return whether an SVG file is only a drawing, without scripts, links or external content."""
    try:
        elements = list(ElementTree.fromstring(text).iter())
    except ElementTree.ParseError:
        return False
    for element in elements:
        if str(element.tag).rpartition("}")[2] not in DRAWN:
            return False
        for key, value in element.attrib.items():
            name = key.rpartition("}")[2].lower()
            if name.startswith("on") or (name == "href" and not value.startswith(INSIDE)):
                return False
            if "url(" in value.replace("url(#", ""):
                return False
    return "<!" not in text
