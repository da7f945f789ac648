"""Pictures of what a reducer kept: the image with dropped tokens faded, merged ones in the colour of their group."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from tokenreduce.attach import ImageReduction
from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.benchmarks.images import rgb
from tokenreduce.evaluation.records import Record
from tokenreduce.reducer import Grid

KEPT_TOKENS = "figures/kept_tokens.png"
"""Where in a run's folder the picture stands."""

_PIXELS = 480
_COLUMNS = 3
_RIGHT, _WRONG, _INK, _FAINT = "#1a7f37", "#c0392b", "#1f2328", "#8c959f"
_PAPER = 245
_CELLS = 1024
"""Grids up to this size are drawn with every cell's border."""

Pixels = npt.NDArray[np.float64]


def draw_kept_tokens(
    benchmark: Benchmark,
    reduced: Sequence[Record],
    unreduced: Sequence[Record],
    path: Path,
    *,
    name: str,
    title: str,
    count: int = 6,
    padded: bool = False,
) -> bool:
    """Draw ``count`` images with what was kept, the question and the answers; false where there is nothing to draw.

    Images are the benchmark's first ones, and every category gets its turn: none is chosen for its look. ``name`` is
    the reducer's; ``padded`` tells that the model sees pictures squared by padding and not cropped.
    """
    shown = _examples(benchmark, reduced, count)
    if not shown:
        return False
    before = {record.id: record for record in unreduced}
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.7 * columns, 4.7 * rows + 0.6), dpi=150, facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    varies = len({record.entering for record, _ in shown}) > 1
    for panel, (record, image) in zip(panels, shown, strict=False):
        layout = record.overview or ImageReduction(Grid(1, 1))
        _draw_image(panel, as_seen(image, layout, padded), layout)
        question = textwrap.fill(record.question, 36, max_lines=3, placeholder=" …")
        panel.set_title(question, fontsize=11, fontweight="bold", color=_INK, pad=8)
        lines = [("expected", textwrap.shorten(" / ".join(record.expected), 24, placeholder=" …"), _INK)]
        if (plain := before.get(record.id)) is not None and plain.error is None:
            lines.append(("unreduced", *_verdict(plain)))
        lines.append((name, *_verdict(record)))
        if varies:
            lines.append(("tokens kept", f"{record.entering} of {record.visual_tokens}", _INK))
        _caption(panel, lines)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def faded(image: Image.Image, record: ImageReduction) -> Pixels:
    """``(height, width, 3)`` in [0, 1]: the image with dropped tokens faded to paper and merged groups tinted."""
    rows, columns = record.grid.height, record.grid.width
    pixels = np.asarray(rgb(image).resize((_PIXELS, _PIXELS), Image.Resampling.LANCZOS), dtype=float)
    kept, groups = kept_and_groups(record)
    grey = pixels.mean(axis=-1, keepdims=True)
    dropped = 0.16 * pixels + 0.12 * grey + 0.72 * _PAPER
    mask = _enlarged(kept.reshape(rows, columns), pixels.shape)
    result = np.where(mask[..., None], pixels, dropped)
    if groups is not None:
        tints = colormaps["tab20"](groups % 20)[:, :3].reshape(rows, columns, 3) * 255
        tint = np.stack([_enlarged(tints[..., channel], pixels.shape) for channel in range(3)], axis=-1)
        result = np.where(mask[..., None], 0.74 * result + 0.26 * tint, result)
    return np.clip(result / 255, 0, 1)


def kept_and_groups(record: ImageReduction) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64] | None]:
    """For every token of the first frame whether anything of it is left, and its output row where rows are merged."""
    rows, columns = record.grid.height, record.grid.width
    if not record.steps:
        return np.ones(rows * columns, dtype=bool), None
    source = np.asarray(record.steps[-1].source[: rows * columns], dtype=np.int64)
    kept = source >= 0
    merged = len(np.unique(source[kept])) < kept.sum()
    return kept, source if merged else None


def drawable(record: ImageReduction) -> bool:
    """Whether every token has a place in the grid: packing may have put others among them."""
    return not record.steps or len(record.steps[-1].source) == len(record.grid)


def borders(record: ImageReduction) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Lines between tokens, as ``(column, row)`` ends: where what is kept, or what is merged with what, changes."""
    rows, columns = record.grid.height, record.grid.width
    kept, groups = kept_and_groups(record)
    values = np.where(kept, 0 if groups is None else groups, -1).reshape(rows, columns)
    upright = [((x, y), (x, y + 1)) for y in range(rows) for x in range(1, columns) if values[y, x] != values[y, x - 1]]
    level = [((x, y), (x + 1, y)) for y in range(1, rows) for x in range(columns) if values[y, x] != values[y - 1, x]]
    return upright + level


def _examples(benchmark: Benchmark, records: Sequence[Record], count: int) -> list[tuple[Record, Image.Image]]:
    """One answered sample of each of the first images, going through the categories in turn."""
    by_image: dict[str, dict[str, Record]] = {}
    for record in records:
        if record.error is None and record.overview and drawable(record.overview):
            by_image.setdefault(record.image_id, {}).setdefault(record.category, record)
    order = list(dict.fromkeys(category for each in by_image.values() for category in each))
    shown: list[tuple[Record, Image.Image]] = []
    for choices in by_image.values():
        if len(shown) == count:
            break
        wanted = order[len(shown) % len(order)]
        record = choices.get(wanted) or next(iter(choices.values()))
        shown.append((record, benchmark.images(sample_of(record))[0]))
    return shown


def sample_of(record: Record) -> Sample:
    """The question that a record answers."""
    return Sample(record.id, record.question, record.expected, record.category, record.image_id)


def _draw_image(panel: Axes, image: Image.Image, layout: ImageReduction) -> None:
    rows, columns = layout.grid.height, layout.grid.width
    panel.imshow(faded(image, layout), extent=(0, columns, rows, 0), aspect="equal")
    _outline(panel, layout)
    panel.set_xlim(-0.06, columns + 0.06)
    panel.set_ylim(rows + 0.06, -0.06)
    panel.set_axis_off()


def _caption(panel: Axes, lines: Sequence[tuple[str, str, str]]) -> None:
    """Below the panel, a line for every (name, text, colour)."""
    for number, (name, text, color) in enumerate(lines):
        place = -0.03 - 0.068 * number
        panel.text(0.48, place, name, transform=panel.transAxes, ha="right", va="top", fontsize=9.5, color=_FAINT)
        panel.text(
            0.52,
            place,
            text,
            transform=panel.transAxes,
            ha="left",
            va="top",
            fontsize=9.5,
            color=color,
            fontweight="bold",
        )


def _verdict(record: Record) -> tuple[str, str]:
    """The answer as it is shown, and its colour."""
    answer = textwrap.shorten(record.answer or "(nothing)", 24, placeholder=" …")
    right = (record.score or 0) >= 0.5
    return f"{answer} {'✓' if right else '✗'}", _RIGHT if right else _WRONG


def _outline(panel: Axes, layout: ImageReduction) -> None:
    """A line wherever what is kept, or what is merged with what, changes; faint cells inside."""
    rows, columns = layout.grid.height, layout.grid.width
    kept, _ = kept_and_groups(layout)
    if rows * columns <= _CELLS:
        cells = [Rectangle((x, y), 1, 1) for y, x in np.argwhere(kept.reshape(rows, columns))]
        panel.add_collection(PatchCollection(cells, facecolor="none", edgecolor=(1, 1, 1, 0.4), linewidth=0.35))
    panel.add_collection(LineCollection(borders(layout), colors=_INK, linewidth=0.9, capstyle="projecting"))
    panel.add_patch(Rectangle((0, 0), columns, rows, fill=False, linewidth=0.9, edgecolor=_FAINT))


def as_seen(image: Image.Image, layout: ImageReduction, padded: bool) -> Image.Image:
    """The part of an image that the grid of tokens lies over."""
    rows, columns = layout.grid.height, layout.grid.width
    image = rgb(image)
    if padded:
        return ImageOps.pad(image, (max(image.size),) * 2, color=(122, 116, 104))
    width = min(image.width, round(image.height * columns / rows))
    height = min(image.height, round(image.width * rows / columns))
    return ImageOps.fit(image, (width, height))


def _enlarged(cells: npt.NDArray[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """Cell values spread over pixels."""
    rows = np.arange(shape[0]) * cells.shape[0] // shape[0]
    columns = np.arange(shape[1]) * cells.shape[1] // shape[1]
    return cells[rows[:, None], columns[None, :]]
