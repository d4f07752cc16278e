"""Plots, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mpp.errors import UserError

NAMED_CLASSES = 40
"""A confusion matrix of more is drawn without names and numbers."""


class Line(NamedTuple):
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half_width: Sequence[float] | None = None
    """Of an interval around y."""
    dashed: bool = False


class Level(NamedTuple):
    """A horizontal line."""

    name: str
    y: float


def draw(
    panels: Mapping[str, Sequence[Line | Level]], out: Path, *, xlabel: str, ylabel: str, log_x: bool = False
) -> None:
    """Panels side by side, each with its title, on a common scale. UserError where `out` cannot be written."""
    from matplotlib.figure import Figure  # half a second, and only here

    figure = Figure(figsize=(4.2 * len(panels) + 1, 3.8), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, marks) in zip(axes, panels.items(), strict=True):
        for mark in marks:
            if isinstance(mark, Level):
                axis.axhline(mark.y, label=mark.name, linestyle=":", color="grey")
                continue
            style = "--" if mark.dashed else "-"
            if mark.half_width is not None:
                axis.errorbar(mark.x, mark.y, mark.half_width, label=mark.name, linestyle=style, marker="o", capsize=3)
            else:
                axis.plot(mark.x, mark.y, label=mark.name, linestyle=style, marker="o")
        if log_x:
            axis.set_xscale("log")
            ticks = sorted({x for mark in marks if isinstance(mark, Line) for x in mark.x})
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel(ylabel)
    _save(figure, out)


def confusion(counts: np.ndarray, classes: Sequence[str], out: Path) -> None:
    """(true, said) counts as shares of each true class. UserError where `out` cannot be written."""
    from matplotlib.figure import Figure

    n = len(classes)
    side = min(max(3.5, 0.35 * n), 16)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axis: Any = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axis, label="share of the true class")
    if n <= NAMED_CLASSES:
        axis.set_xticks(range(n), [_as_it_is(c) for c in classes], rotation=90)
        axis.set_yticks(range(n), [_as_it_is(c) for c in classes])
        for i, j in np.argwhere(counts):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axis.text(j, i, counts[i, j], ha="center", va="center", fontsize="x-small", color=colour)
    axis.set_xlabel("said")
    axis.set_ylabel("true")
    _save(figure, out)


def gallery(
    pictures: Sequence[tuple[Tensor, str]], out: Path, legend: Sequence[tuple[str, Sequence[int]]] = ()
) -> None:
    """(C, H, W) uint8 images with captions; colours in 0 to 255 with names. UserError where `out` cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(pictures), 6)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.8 * columns, 2.2 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (pixels, caption) in zip(axes, pictures, strict=False):
        array = pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy()
        axis.imshow(array, cmap="gray", vmin=0, vmax=255)
        axis.set_title(_as_it_is(caption), fontsize="x-small")
    if legend:
        patches = [Patch(color=f"#{r:02x}{g:02x}{b:02x}", label=_as_it_is(name)) for name, (r, g, b) in legend]
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize="x-small", frameon=False)
    _save(figure, out)


def _as_it_is(text: str) -> str:
    """Not as a formula, which is what matplotlib takes dollars for; nor with bytes that are no text."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()


def _save(figure: Any, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
