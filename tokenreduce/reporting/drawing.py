"""The style of the report's figures, and the parts that they are put together from.

Names stand beside what they name, lines are quiet, and what belongs to a row or a series of a study carries its number
as its id in SVG: by that the page filters it and tells its values.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from tokenreduce.evaluation.statistics import Estimate

INK, FAINT, GRID, CHANCE, FRONT = "#1f2329", "#68707a", "#dfe3e8", "#8b939c", "#f3c14b"
COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#c0569b", "#e69f00", "#56b4e9",
    "#7a6fdb", "#a6761d", "#44aa99", "#b8336a", "#8a9a1f", "#6d7f99",
)  # fmt: skip
"""After Okabe and Ito, and Tol: told apart with any colour vision, on white and on black. One a method, everywhere."""
MARKERS = "osD^v"
"""A second sign besides colour; five of them and twelve colours make sixty pairs."""

BETTER = LinearSegmentedColormap.from_list("better", ["#b35806", "#f6b26b", "#f7f7f5", "#92c5de", "#2166ac"])
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
}
ROW = 0.3
"""Inches of height that a row takes in a figure with one line a row."""


@dataclass
class Chart:
    """One figure: ``name`` is its file's, ``title`` and ``caption`` its words, ``tips`` what its parts say by id."""

    name: str
    title: str
    caption: str
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)

    @cached_property
    def svg(self) -> str:
        """The figure on white as text of SVG, without an XML header."""
        text = io.StringIO()
        with styled(salt=self.name):
            self.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        content = text.getvalue()
        return content[content.index("<svg") :]

    def png(self, path: Path) -> None:
        """Write the figure as a picture on white."""
        with styled():
            self.figure.savefig(path, dpi=200, metadata={"Software": None})


def shade(value: float, limit: float) -> tuple[str, str]:
    """The heat map's background for a difference, and the ink to write on it."""
    color = BETTER(0.5 + 0.5 * max(-1.0, min(1.0, value / limit)))[:3]
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 0.55
    return to_hex(color), INK if light else "#ffffff"


@contextmanager
def styled(salt: str = "") -> Iterator[None]:
    """The style that figures are made and written in; ``salt`` decides the ids of what they share."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def whiskers(axes: Axes, estimate: Estimate | None, y: float, color: str) -> list[Artist]:
    """A line across from end to end of an interval, in percent; none where it has no ends."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return []
    ends = [100 * estimate.low, 100 * estimate.high]
    return [*axes.plot(ends, [y, y], color=color, linewidth=1.3, alpha=0.55, solid_capstyle="round")]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is cheaper than and at least as good, dearest first, the score in percent."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return [(cost, 100 * score) for cost, score in reversed(front)]


def cost_axis(axes: Axes, values: Sequence[float]) -> None:
    """Costs in percent, the cheaper to the right; in equal ratios where they span more than a factor of four."""
    low, high = min(values), max([1.0, *values])
    if low > 0 and high / low > 4:
        axes.set_xscale("log")
        ticks = [
            tick
            for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
            if low * 0.8 <= tick <= high * 1.01
        ]
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(high * 1.04, low / 1.15)
    else:
        margin = max(0.04 * (high - low), 0.01)
        axes.set_xlim(high + margin, low - margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))


def bars_axis(axes: Axes, label: str) -> None:
    """An axis from 0 across, with its grid."""
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str, str]]) -> None:
    """Names in a column to the right, each joined to its last point, none upon another."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: -end[1])
    places = apart([y for _, y, *_ in ordered], (high - low) / max(19, len(ends) + 4))
    for (x, y, name, color, identity), place in zip(ordered, places, strict=True):
        text = axes.annotate(
            name, (x, y), xytext=(1.02, place), textcoords=axes.get_yaxis_transform(), va="center", color=color,
            fontweight="bold", fontsize=9.5, annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": color, "alpha": 0.35, "lw": 0.8,
                "shrinkB": 4, "shrinkA": 2, "relpos": (0, 0.5),
            },
        )  # fmt: skip
        text.set_gid(f"{identity}-label")
    axes.set_ylim(low, high)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Descending places, moved as little as it takes to be ``gap`` apart: those that touch share their displacement."""
    groups: list[tuple[float, int]] = []  # the middle of each, and how many are in it
    for place in places:
        middle, count = place, 1
        while groups and groups[-1][0] - middle < gap * (groups[-1][1] + count) / 2:
            before, others = groups.pop()
            middle, count = (before * others + middle * count) / (others + count), others + count
        groups.append((middle, count))
    return [middle + gap * ((count - 1) / 2 - number) for middle, count in groups for number in range(count)]
