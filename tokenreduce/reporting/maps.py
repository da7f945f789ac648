"""Maps of a sample's tokens for pictures: which were kept and merged, in every whole picture and frame, side by side.

A row that was merged out of several tiles is one group in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tokenreduce.attach import ImageReduction
from tokenreduce.evaluation.records import Record

_SHOWN = 8
"""At most so many frames are shown, evenly spaced."""
_ABREAST = 4
_GAP = 0.04
"""Between tiles, in widths of one."""

Line = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class TokenMap:
    """The tokens of one tile after all steps.

    kept:   ``(height, width)``, True for every token that something is left of.
    groups: ``(height, width)``, the row that every token went into, numbered over all tiles of the sample, -1 for a
            dropped one; None where nothing was merged.
    time:   of a frame, in seconds, where it is known.
    """

    kept: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.int64] | None
    time: float | None = None

    @property
    def rows(self) -> int:
        return self.kept.shape[0]

    @property
    def columns(self) -> int:
        return self.kept.shape[1]

    def borders(self) -> list[Line]:
        """Lines between tokens, as ``(column, row)`` ends: where what is kept, or merged with what, changes."""
        values = np.where(self.kept, 0 if self.groups is None else self.groups, -1)
        upright = np.argwhere(values[:, 1:] != values[:, :-1])
        level = np.argwhere(values[1:] != values[:-1])
        return [((x + 1, y), (x + 1, y + 1)) for y, x in upright] + [((x, y + 1), (x + 1, y + 1)) for y, x in level]


@dataclass(frozen=True)
class Place:
    """The place of a tile on a sheet that is 1 wide."""

    x: float
    y: float
    width: float
    height: float


def token_maps(record: Record) -> list[TokenMap]:
    """A sample's pictures in their order, its frames by time: as far as every token has a place in its grid.

    Of a picture that the model sees in crops only the tile that shows all of it is among them.
    """
    groups = _groups(record.images)
    found = np.concatenate([each[each >= 0] for each in groups]) if groups else np.empty(0)
    merged = len(np.unique(found)) < len(found)
    whole = [
        (tile, rows) for tile, rows in zip(record.images, groups, strict=True) if not tile.part and _has_places(tile)
    ]
    return [
        TokenMap(cells >= 0, cells if merged else None, tile.time)
        for tile, rows in sorted(whole, key=lambda pair: (pair[0].picture, pair[0].time or 0.0))
        for cells in [rows.reshape(tile.grid.height, tile.grid.width)]
    ]


def spaced(count: int) -> list[int]:
    """The places of tiles that are shown among ``count``."""
    return np.linspace(0, count - 1, min(count, _SHOWN)).round().astype(int).tolist()


def image_of(images: Sequence[Image.Image], place: int, count: int) -> Image.Image | None:
    """The image below one of ``count`` tiles; a model may see a video in fewer frames than it has."""
    return images[place * len(images) // count] if images else None


def as_seen(image: Image.Image, tokens: TokenMap, padded: bool) -> Image.Image:
    """The part of an image that the grid of tokens lies over; ``padded`` where the model squares it by padding."""
    image = image.convert("RGB")
    if padded:
        return ImageOps.pad(image, (max(image.size),) * 2, color=(122, 116, 104))
    width = min(image.width, round(image.height * tokens.columns / tokens.rows))
    height = min(image.height, round(image.width * tokens.rows / tokens.columns))
    return ImageOps.fit(image, (width, height))


def sheet(ratios: Sequence[float]) -> tuple[list[Place], float]:
    """Places side by side for tiles of these ratios, height to width, and the height of all."""
    abreast = min(len(ratios), _ABREAST)
    width = 1 / (abreast + _GAP * (abreast - 1))
    places: list[Place] = []
    bottom = 0.0
    for start in range(0, len(ratios), abreast):
        line = ratios[start : start + abreast]
        top = bottom + _GAP * width if start else 0.0
        places += [Place(number * (1 + _GAP) * width, top, width, ratio * width) for number, ratio in enumerate(line)]
        bottom = top + max(line) * width
    return places, bottom


def _groups(tiles: Sequence[ImageReduction]) -> list[npt.NDArray[np.int64]]:
    """For every token of every tile the row that it went into, numbered over all tiles, -1 for a dropped one."""
    sources, targets = [], []
    count = np.zeros(len(tiles) + 1, dtype=np.int64)  # the last one, which -1 means, is of rows that are in no tile
    for number, tile in enumerate(tiles):
        last = tile.steps[-1] if tile.steps else None
        source = np.asarray(range(len(tile.grid)) if last is None else last.source, dtype=np.int64)
        target = np.asarray(last.into if last and last.into else [number] * len(source), dtype=np.int64)
        np.maximum.at(count, target[source >= 0], source[source >= 0] + 1)
        sources.append(source)
        targets.append(target)
    start = np.cumsum(count) - count
    return [np.where(source >= 0, start[target] + source, -1) for source, target in zip(sources, targets, strict=True)]


def _has_places(tile: ImageReduction) -> bool:
    """True if every token has a place in the grid: packing may have put others among them."""
    return not tile.steps or len(tile.steps[-1].source) == tile.grid.height * tile.grid.width
