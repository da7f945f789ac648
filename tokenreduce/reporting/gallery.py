"""The tokens that every method kept of the same pictures, side by side, in SVG that is laid over the picture."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.evaluation.records import Record
from tokenreduce.registry import BENCHMARKS
from tokenreduce.reporting.discovery import Comparison
from tokenreduce.reporting.maps import Place, TokenMap, as_seen, image_of, sheet, spaced, token_maps
from tokenreduce.reporting.pictures import sample_of
from tokenreduce.reporting.study import Row, Study

_SIDE = 336
"""Pixels of a picture's longer side."""
_TINTS = 12
"""Colours that merged groups take turns in; the page's style has them."""


@dataclass(frozen=True)
class Layer:
    """Paths that are laid over one tile of a picture, in units of tokens.

    dropped: tokens that are gone; edges: where what is kept, or merged, changes; tints: merged tokens by colour.
    """

    place: Place
    columns: int
    rows: int
    dropped: str
    edges: str
    tints: Mapping[int, str]


@dataclass(frozen=True)
class Kept:
    """One method's answer about a picture, and what is laid over it. number: the row's place in the study."""

    row: Row
    number: int
    record: Record
    right: bool
    layers: Sequence[Layer]


@dataclass(frozen=True)
class Drawn:
    """A sample with what every method made of it.

    picture: all its tiles side by side, as ``data:`` URI, or None where there is none; ratio: of height to width.
    """

    record: Record
    right: bool
    picture: str | None
    ratio: float
    kept: Sequence[Kept]

    @property
    def budgets(self) -> dict[int, list[Kept]]:
        """The methods' answers by budget."""
        found: dict[int, list[Kept]] = {}
        for each in sorted(self.kept, key=lambda each: (not each.row.is_method, each.row.series)):
            found.setdefault(each.row.budget, []).append(each)
        return dict(sorted(found.items()))


def first_samples(records: Iterable[Record], count: int) -> list[str]:
    """``count`` samples, each of another image, going through the categories in turn: none is chosen for its look."""
    by_image: dict[str, dict[str, str]] = {}
    for record in records:
        if record.error is None and record.images:
            by_image.setdefault(record.image_id, {}).setdefault(record.category, record.id)
    order = list(dict.fromkeys(category for each in by_image.values() for category in each))
    chosen: list[str] = []
    for samples in by_image.values():
        if len(chosen) == count:
            break
        chosen.append(samples.get(order[len(chosen) % len(order)]) or next(iter(samples.values())))
    return chosen


def gallery(study: Study, samples: Iterable[str]) -> list[Drawn]:
    """The study's answers about ``samples``, as far as it has them."""
    plain = {record.id: record for record in study.unreduced.comparison.answered}
    wanted = [plain[each] for each in samples if each in plain]
    benchmark = _benchmark(study.unreduced.comparison) if wanted else None
    return [_drawn(study, record, benchmark) for record in wanted]


def _drawn(study: Study, plain: Record, benchmark: Benchmark | None) -> Drawn:
    padded = bool(study.unreduced.comparison.config.get("model", {}).get("do_pad"))
    images = _images(benchmark, plain)
    found = token_maps(plain) or [TokenMap(np.ones((1, 1), dtype=bool), None)]
    shown = spaced(len(found))
    under = [(found[place], image_of(images, place, len(found))) for place in shown]
    seen = [as_seen(image, tokens, padded) for tokens, image in under if image is not None]
    places, height = sheet(
        [each.height / each.width for each in seen] or [tokens.rows / tokens.columns for tokens, _ in under]
    )
    kept = []
    for number, row in enumerate(study.rows[1:], 1):
        runs = row.comparison.records.get(row.key, ())
        record = runs[0].get(plain.id) if runs else None
        if record is not None and record.error is None and len(cut := token_maps(record)) == len(found):
            layers = [_layer(cut[each], place) for each, place in zip(shown, places, strict=True)]
            kept.append(Kept(row, number, record, _right(record), layers))
    picture = _encoded(seen, places, height) if seen else None
    return Drawn(plain, _right(plain), picture, height, kept)


def _layer(tokens: TokenMap, place: Place) -> Layer:
    tints: dict[int, list[str]] = {}
    if tokens.groups is not None:
        for (y, x), group in np.ndenumerate(tokens.groups):
            if group >= 0:
                tints.setdefault(int(group) % _TINTS, []).append(f"M{x} {y}h1v1h-1z")
    dropped = []
    for y in range(tokens.rows):
        x = 0
        while x < tokens.columns:
            start = x
            while x < tokens.columns and not tokens.kept[y, x]:
                x += 1
            if x > start:
                dropped.append(f"M{start} {y}h{x - start}v1h-{x - start}z")
            x += 1
    edges = "".join(f"M{x} {y}L{to_x} {to_y}" for (x, y), (to_x, to_y) in tokens.borders())
    tinted = {tint: "".join(cells) for tint, cells in tints.items()}
    return Layer(place, tokens.columns, tokens.rows, "".join(dropped), edges, tinted)


def _right(record: Record) -> bool:
    return (record.score or 0.0) >= 0.5


def _benchmark(comparison: Comparison) -> Benchmark | None:
    """The benchmark that was asked, for its pictures; None, with a warning, where it cannot be made here."""
    # The result may have its title instead of what it is installed as.
    name = comparison.config.get("benchmark", {}).get("name") or comparison.result.benchmark.name
    knobs = comparison.result.run.identity.get("benchmark", {}).get("knobs", {})
    try:
        return BENCHMARKS.create(name, **knobs)
    except Exception as error:  # a benchmark of anybody's, on data that may be elsewhere; pictures are no necessity
        warnings.warn(f"samples are drawn without their pictures: benchmark {name!r}: {error}", stacklevel=2)
        return None


def _images(benchmark: Benchmark | None, record: Record) -> Sequence[Image.Image]:
    if benchmark is None:
        return ()
    try:
        return benchmark.images(sample_of(record))
    except Exception as error:  # as above, or a file that is gone
        warnings.warn(f"sample {record.id!r} is drawn without its picture: {error}", stacklevel=2)
        return ()


def _encoded(seen: Sequence[Image.Image], places: Sequence[Place], height: float) -> str:
    """Images at their places on one sheet."""
    scale = _SIDE / max(1.0, height) * (1 if len(seen) == 1 else 2)
    picture = Image.new("RGB", (round(scale), round(scale * height)), "white")
    for image, place in zip(seen, places, strict=True):
        size = (round(scale * place.width), round(scale * place.height))
        picture.paste(image.convert("RGB").resize(size), (round(scale * place.x), round(scale * place.y)))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
