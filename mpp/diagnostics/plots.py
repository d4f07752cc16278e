"""Plots, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpp.errors import UserError


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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
