"""The report: one self-contained page, with its tables and figures beside it as files."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from tokenreduce.evaluation.records import Record, storage, write_atomically
from tokenreduce.reporting.charts import CURRENCIES, Painter
from tokenreduce.reporting.columns import Column, costs, quality
from tokenreduce.reporting.discovery import Comparison, Skipped, find
from tokenreduce.reporting.drawing import CHANCE, COLORS, FAINT, FRONT, GRID, INK, Chart, shade
from tokenreduce.reporting.files import CATEGORIES, FIGURES, MARKDOWN, PAGE, RESULTS, write_tables
from tokenreduce.reporting.findings import bound, faster, findings
from tokenreduce.reporting.formatting import percent, points, signed, tokens
from tokenreduce.reporting.gallery import first_samples, gallery
from tokenreduce.reporting.study import Row, Study, difference_in, score_in, studies

_SAMPLES = 6
_ANSWER = 160
"""Characters of an answer that are shown."""
_VARIABLES = {
    **{color: f"var(--s{place})" for place, color in enumerate(COLORS)},
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--line)",
    CHANCE: "var(--chance)",
    FRONT: "var(--front)",
    "#ffffff": "var(--paper)",
}
"""Colours of figures by which the page's style knows them: that is how they are light or dark with it."""


def write_report(
    runs: Sequence[Path | str],
    output: Path | str = "report",
    *,
    title: str | None = None,
    samples: Sequence[str] | None = None,
) -> Path:
    """Write a page, Markdown and CSV tables and figures about finished runs, from their records alone.

    ``runs`` are folders of runs or folders that hold them; ``samples`` are those whose kept tokens are drawn, by
    default some of every category. What is broken or not finished is listed and left out. Returns the page's path.
    Raises ``ValueError`` where no run is finished, ``StorageError`` where ``output`` cannot be written.
    """
    output = Path(output)
    found, skipped = find(runs, partial(_chosen, samples=samples))
    told = studies(found)
    heading = title or "; ".join(dict.fromkeys(study.title for study in told))
    with storage(output):
        (output / FIGURES).mkdir(parents=True, exist_ok=True)
    write_tables(told, output, heading)
    series = sorted({name for study in told for name in study.series})
    views = []
    for number, study in enumerate(told):
        view = _View(study, Painter(study, series), number, samples)
        for chart in view.charts.values():
            stem = output / FIGURES / (chart.name if len(told) == 1 else f"{number + 1}_{chart.name}")
            chart.png(stem.with_suffix(".png"))
            write_atomically(stem.with_suffix(".svg"), chart.svg)
        views.append(view)
    write_atomically(output / PAGE, _page(heading, views, skipped))
    return output / PAGE


def _chosen(records: Iterable[Record], samples: Sequence[str] | None) -> Sequence[str]:
    return first_samples(records, _SAMPLES) if samples is None else samples


@dataclass(frozen=True)
class _Look:
    """The series and colour of a row, and its score as it is drawn."""

    series: str
    color: str
    whisker: _Whisker


@dataclass(frozen=True)
class _Whisker:
    """A score with its interval, and the unreduced model's score, in percent of a column's width."""

    value: float
    low: float | None
    high: float | None
    base: float


class _View:
    """One study as the template wants it."""

    def __init__(self, study: Study, painter: Painter, number: int, samples: Sequence[str] | None) -> None:
        self.study = study
        self.charts = {chart.name: chart for chart in painter.charts()}
        self._number = number
        self._painter = painter
        scores = [row.method.score for row in study.rows]
        ends = [end for score in scores for end in (score.value, score.low, score.high) if end is not None]
        self._scale = min(ends), max(max(ends) - min(ends), 1e-9)
        self.looks = [self._look(row) for row in study.rows]
        self.series = [(name, self._look_of(name)) for name in study.series]
        self.has_random = any(not row.is_method for row in study.rows[1:])
        self.quality, self.spending = quality(study), costs(study)
        self.findings = findings(study)
        self.faster = faster(study)
        self.hardware = bound(study)
        self.facts = _facts(study)
        self.heat = self._heat() if "categories" in self.charts else []
        wanted = samples if samples is not None else first_samples(study.unreduced.comparison.answered, _SAMPLES)
        self.gallery = gallery(study, wanted)
        tradeoffs = [(each, self.charts.get(f"score_{each.name}")) for each in CURRENCIES]
        self.tradeoffs = [self._drawn(chart) | {"tab": each.tab} for each, chart in tradeoffs if chart]
        self.ranking, self.speed, self.costs = (
            self._drawn(self.charts[name]) if name in self.charts else None for name in ("ranking", "speed", "costs")
        )

    def _look(self, row: Row) -> _Look:
        least, width = self._scale

        def place(score: float) -> float:
            return round(4 + 92 * (score - least) / width, 2)

        score = row.method.score
        low, high = (None if end is None else place(end) for end in (score.low, score.high))
        whisker = _Whisker(place(score.value), low, high, place(self.study.unreduced.score))
        return _Look(self._painter.series_id(row), self._variable(row), whisker)

    def _look_of(self, name: str) -> _Look:
        place = next(place for place, row in enumerate(self.study.rows) if row.is_method and row.series == name)
        return self.looks[place]

    def _variable(self, row: Row) -> str:
        color = self._painter.color(row)
        return _VARIABLES[color].removeprefix("var(--").removesuffix(")")

    def _heat(self) -> list[tuple[Row, _Look, list[dict[str, Any]]]]:
        study = self.study
        found = [[difference_in(row, name) for name in study.categories] for row in study.methods]
        limit = max([0.05, *(abs(difference.value) for row in found for difference in row if difference)])
        table = []
        for row, differences in zip(study.methods, found, strict=True):
            cells = []
            for name, difference in zip(study.categories, differences, strict=True):
                background, ink = shade(difference.value if difference else 0.0, limit)
                cells.append(
                    {
                        "value": difference.value if difference else "",
                        "text": signed(difference.value) if difference else "",
                        "title": f"{percent(score_in(row, name))} %; {points(difference)} points",
                        "background": background,
                        "ink": ink,
                    }
                )
            table.append((row, self.looks[study.rows.index(row)], cells))
        return table

    def _drawn(self, chart: Chart) -> dict[str, Any]:
        prefix = f"c{self._number}-{chart.name}-"
        rows = {str(place): str(row.budget) for place, row in enumerate(self.study.rows)}
        return {"title": chart.title, "caption": chart.caption, "svg": inlined(chart, prefix, rows)}


def inlined(chart: Chart, prefix: str, budgets: Mapping[str, str]) -> Markup:
    """A chart's SVG for a page: unique ids, the page's fonts and colours, and what its parts say when pointed at.

    ``budgets`` are those of rows, by number.
    """
    svg = chart.svg
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="chart" viewBox="\1">', svg, count=1)
    svg = re.sub(r"font-family:[^;\"]*;? ?", "", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    svg = svg.replace("xlink:href", "href")

    def marked(found: re.Match[str]) -> str:
        name = found[1]
        part = re.match(r"(s\d+|random|unreduced)-(?:row-(\d+)|name-(\d+)|line|label)", name)
        if not part:
            return f'id="{prefix}{name}"'
        row = part[2] or part[3]
        budget = f' data-budget="{budgets[row]}"' if row else ""
        return f'id="{prefix}{name}" class="mark" data-series="{part[1]}"{budget}'

    svg = re.sub(r'id="([^"]*)"', marked, svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg).replace("url(#", f"url(#{prefix}")
    for name, tip in chart.tips.items():
        svg = re.sub(
            rf'(<g id="{re.escape(prefix + name)}"[^>]*>)', rf"\g<1><title>{_quoted(tip)}</title>", svg, count=1
        )
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(chart.title)}" ', 1))


def _quoted(text: str) -> str:
    """Escaped for SVG, and for being a replacement."""
    return str(escape(text)).replace("\\", "\\\\")


def _facts(study: Study) -> list[str]:
    result = study.unreduced.comparison.result
    benchmark, model = result.benchmark, result.run.identity.get("model", {})
    how = " · ".join(str(model[name]) for name in ("device", "dtype", "attention") if name in model)
    facts = [
        f"{benchmark.samples} questions, {benchmark.images} images",
        f"{len(study.methods)} settings of {len(study.series)} methods",
        f"{tokens(study.unreduced.layer_mean)} visual tokens unreduced",
        str(model.get("class", "")),
        how,
    ]
    return [fact for fact in facts if fact]


def _page(title: str, views: Sequence[_View], skipped: Sequence[Skipped]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tokenreduce", "assets/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"answer": _answer, "tone": _tone}
    assets = files("tokenreduce") / "assets" / "report"
    script = (assets / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    comparisons = [each for view in views for each in view.study.comparisons]
    all_columns = {each.name: each for view in views for each in (*view.quality, *view.spending)}
    return environment.get_template("page.html").render(
        title=title,
        lede=_lede(views),
        studies=views,
        skipped=skipped,
        runs=[_run(each) for each in comparisons],
        all_columns=[column for column in all_columns.values() if column.title != "p"],
        files=[MARKDOWN, RESULTS, CATEGORIES],
        script=Markup(script),
        script_digest=f"sha256-{digest}",
        style=Markup((assets / "page.css").read_text(encoding="utf-8")),
        version=version("tokenreduce"),
    )


def _lede(views: Sequence[_View]) -> str:
    methods = sorted({name for view in views for name in view.study.series})
    return (
        f"{len(methods)} methods against the unreduced model and against chance: paired by sample, with intervals, "
        "in every currency that tokens are paid in."
    )


def _run(comparison: Comparison) -> dict[str, str]:
    identity = comparison.result.run.identity
    model = identity.get("model", {})
    reducer = identity.get("reducer", {})
    return {
        "name": comparison.folder.name,
        "samples": str(comparison.result.benchmark.samples),
        "model": ", ".join(str(model[name]) for name in ("class", "dtype", "device", "attention") if name in model),
        "settings": _settings(reducer.get("knobs", {})),
        "versions": _settings(identity.get("versions", {}), " "),
    }


def _settings(values: Mapping[str, Any], equals: str = "=") -> str:
    return ", ".join(f"{name}{equals}{value}" for name, value in values.items())


def _answer(text: str | None) -> str:
    """A model's answer, cut where it would fill the page."""
    text = " ".join((text or "(nothing)").split())
    return text if len(text) <= _ANSWER else text[:_ANSWER] + "…"


def _tone(column: Column, row: Row) -> str:
    """``good`` or ``bad`` for a difference that is surely for the better or the worse."""
    p_value = {"unreduced": row.p_unreduced, "random": row.p_random}.get(column.name)
    value = column.value(row)
    if p_value is None or p_value >= 0.05 or value is None:
        return ""
    return "good" if value > 0 else "bad"
