"""The report's picture: held-out loss over FLOPs and over wall clock, one panel each. Draws to a file only.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; line style and marker differ too, for print.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bert2bert.report.result import CurvePoint, Report, RunEntry

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
AXES = ("flops", "seconds")  # of the panels, as the report's fields are called
GREY = "#666666"


def draw(report: Report, file: Path) -> None:
    """Write the picture of a report as PNG. Raises OSError when it cannot."""
    figure_of(report).savefig(file, format="png")


def figure_of(report: Report) -> Figure:
    """The picture itself, unwritten."""
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    handles: list[Line2D] = []
    for axes, axis in zip(panels, AXES, strict=True):
        scale, unit = _unit(axis, report)
        handles = [_curve(axes, run, i, axis, scale) for i, run in enumerate(report.runs)]
        for i, run in enumerate(report.runs):
            handles += _counted(axes, run, i, axis, scale)
            _boundaries(axes, run, i, axis, scale)
        _levels(axes, report)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(left=0)
        axes.grid(True, color="#e5e5e5", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss (nats a predicted token)")
    if any(run.boundaries for run in report.runs):
        handles.append(
            Line2D([], [], color=GREY, marker="|", markersize=10, linestyle="none", label="start of the phase named")
        )
    unique = {handle.get_label(): handle for handle in handles}
    figure.legend(handles=list(unique.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _unit(axis: str, report: Report) -> tuple[float, str]:
    """A scale that keeps the tick labels short, and the axis's title."""
    largest = max((getattr(run, axis) for run in report.runs), default=0)
    if axis == "flops":
        power = 3 * (math.floor(math.log10(largest)) // 3) if largest > 0 else 0
        return 10.0**power, f"FLOPs spent ($\\times 10^{{{power}}}$)"
    for size, name in ((3600, "hours"), (60, "minutes")):
        if largest > 3 * size:
            return size, f"training time ({name})"
    return 1, "training time (seconds)"


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.6,
    }


def _curve(axes: Axes, run: RunEntry, i: int, axis: str, scale: float) -> Line2D:
    label = run.name if run.role == "run" else f"{run.name} ({run.role})"
    x, y = [getattr(point, axis) / scale for point in run.curve], [point.loss for point in run.curve]
    (line,) = axes.plot(x, y, label=label, **_style(i))
    return line


def _counted(axes: Axes, run: RunEntry, i: int, axis: str, scale: float) -> list[Line2D]:
    """The same curve moved right by what the source had cost."""
    cost = getattr(run.source, axis) if run.source and not run.source.within else None
    if cost is None:
        return []
    x, y = [(getattr(point, axis) + cost) / scale for point in run.curve], [point.loss for point in run.curve]
    colour = COLOURS[i % len(COLOURS)]
    return axes.plot(x, y, linestyle="--", linewidth=1.2, color=colour, alpha=0.75, label=f"{run.name}, source counted")


def _boundaries(axes: Axes, run: RunEntry, i: int, axis: str, scale: float) -> None:
    """A tall bar across the curve where a phase gives way to the next, with the new phase's name."""
    for boundary in run.boundaries:
        at = getattr(boundary, axis)
        x, y, colour = at / scale, _height(run.curve, axis, at), COLOURS[i % len(COLOURS)]
        axes.plot([x], [y], "|", color=colour, markersize=22, markeredgewidth=1.8, linestyle="none")
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.annotate(
            boundary.to, (x, y), xytext=(3, 13), textcoords="offset points", fontsize=8, color=colour, bbox=box
        )


def _height(curve: tuple[CurvePoint, ...], axis: str, x: float) -> float:
    """The curve's height at x, linear between evaluations, flat beyond its ends."""
    for before, after in pairwise(curve):
        left, right = getattr(before, axis), getattr(after, axis)
        if left <= x <= right:
            share = (x - left) / (right - left) if right > left else 0.0
            return before.loss + (after.loss - before.loss) * share
    return curve[0].loss if x < getattr(curve[0], axis) else curve[-1].loss


def _levels(axes: Axes, report: Report) -> None:
    """The two losses that matter: the reference's last one and the unigram entropy."""
    levels = [(report.mark, "final loss of " + report.reference, "top")]
    if (entropy := report.heldout.unigram_entropy) is not None:
        levels.append((entropy, "unigram entropy", "bottom"))
    for height, text, side in levels:
        axes.axhline(height, color=GREY, linestyle=":", linewidth=1.1)
        axes.annotate(
            text, (0.99, height), xycoords=axes.get_yaxis_transform(), xytext=(0, 2 if side == "bottom" else -2),
            textcoords="offset points", ha="right", va=side, fontsize=8, color=GREY,
        )  # fmt: skip
