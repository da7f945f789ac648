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
from PIL import Image

from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.evaluation.records import Record
from tokenreduce.reporting.maps import Place, TokenMap, as_seen, image_of, sheet, spaced, token_maps

KEPT_TOKENS = "figures/kept_tokens.png"
"""The picture's place in a run's folder."""

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
    for panel, (record, images) in zip(panels, shown, strict=False):
        _draw_strip(panel, token_maps(record), images, padded)
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


def faded(image: Image.Image, tokens: TokenMap) -> Pixels:
    """``(height, width, 3)`` in [0, 1]: the image with dropped tokens faded to paper and merged groups tinted."""
    pixels = np.asarray(image.convert("RGB").resize((_PIXELS, _PIXELS), Image.Resampling.LANCZOS), dtype=float)
    grey = pixels.mean(axis=-1, keepdims=True)
    dropped = 0.16 * pixels + 0.12 * grey + 0.72 * _PAPER
    mask = _enlarged(tokens.kept, pixels.shape)
    result = np.where(mask[..., None], pixels, dropped)
    if tokens.groups is not None:
        tints = colormaps["tab20"](tokens.groups % 20)[..., :3] * 255
        tint = np.stack([_enlarged(tints[..., channel], pixels.shape) for channel in range(3)], axis=-1)
        result = np.where(mask[..., None], 0.74 * result + 0.26 * tint, result)
    return np.clip(result / 255, 0, 1)


def _examples(
    benchmark: Benchmark, records: Sequence[Record], count: int
) -> list[tuple[Record, Sequence[Image.Image]]]:
    """One answered sample of each of the first images, going through the categories in turn."""
    by_image: dict[str, dict[str, Record]] = {}
    for record in records:
        if record.error is None and token_maps(record):
            by_image.setdefault(record.image_id, {}).setdefault(record.category, record)
    order = list(dict.fromkeys(category for each in by_image.values() for category in each))
    shown: list[tuple[Record, Sequence[Image.Image]]] = []
    for choices in by_image.values():
        if len(shown) == count:
            break
        wanted = order[len(shown) % len(order)]
        record = choices.get(wanted) or next(iter(choices.values()))
        shown.append((record, benchmark.images(sample_of(record))))
    return shown


def sample_of(record: Record) -> Sample:
    """The question that a record answers."""
    return Sample(record.id, record.question, record.expected, record.category, record.image_id)


def _draw_strip(panel: Axes, found: Sequence[TokenMap], images: Sequence[Image.Image], padded: bool) -> None:
    """Pictures, or the frames of a video, as a strip."""
    shown = [(found[place], image_of(images, place, len(found))) for place in spaced(len(found))]
    places, height = sheet([tokens.rows / tokens.columns for tokens, _ in shown])
    for (tokens, image), place in zip(shown, places, strict=True):
        if image is not None:
            extent = (place.x, place.x + place.width, place.y + place.height, place.y)
            panel.imshow(faded(as_seen(image, tokens, padded), tokens), extent=extent, aspect="equal")
        _outline(panel, tokens, place)
        if tokens.time is not None:
            label = panel.text(place.x, place.y, f"{tokens.time:.1f} s", ha="left", va="top", fontsize=6, color=_INK)
            label.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1})
    margin = 0.06 / shown[0][0].columns
    panel.set_xlim(-margin, 1 + margin)
    panel.set_ylim(height + margin, -margin)
    panel.set_axis_off()


def _caption(panel: Axes, lines: Sequence[tuple[str, str, str]]) -> None:
    """Below the panel, a line for every (name, text, colour)."""
    for number, (name, text, color) in enumerate(lines):
        for x, side, words, ink, weight in (
            (0.48, "right", name, _FAINT, "normal"),
            (0.52, "left", text, color, "bold"),
        ):
            panel.annotate(
                words, (x, 0), xycoords="axes fraction", xytext=(0, -7 - 16 * number), textcoords="offset points",
                ha=side, va="top", fontsize=9.5, color=ink, fontweight=weight,
            )  # fmt: skip


def _verdict(record: Record) -> tuple[str, str]:
    """The answer as it is shown, and its colour."""
    answer = textwrap.shorten(record.answer or "(nothing)", 24, placeholder=" …")
    right = (record.score or 0) >= 0.5
    return f"{answer} {'✓' if right else '✗'}", _RIGHT if right else _WRONG


def _outline(panel: Axes, tokens: TokenMap, place: Place) -> None:
    """A line wherever what is kept, or what is merged with what, changes; faint cells inside."""
    wide, high = place.width / tokens.columns, place.height / tokens.rows
    if tokens.rows * tokens.columns <= _CELLS:
        cells = [Rectangle((place.x + x * wide, place.y + y * high), wide, high) for y, x in np.argwhere(tokens.kept)]
        panel.add_collection(PatchCollection(cells, facecolor="none", edgecolor=(1, 1, 1, 0.4), linewidth=0.35))
    lines = [[(place.x + x * wide, place.y + y * high) for x, y in line] for line in tokens.borders()]
    panel.add_collection(LineCollection(lines, colors=_INK, linewidth=0.9, capstyle="projecting"))
    frame = Rectangle((place.x, place.y), place.width, place.height, fill=False, linewidth=0.9, edgecolor=_FAINT)
    panel.add_patch(frame)


def _enlarged(cells: npt.NDArray[np.generic], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """Cell values spread over pixels."""
    rows = np.arange(shape[0]) * cells.shape[0] // shape[0]
    columns = np.arange(shape[1]) * cells.shape[1] // shape[1]
    return cells[rows[:, None], columns[None, :]]
