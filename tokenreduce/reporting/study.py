"""Comparisons that can be set side by side: one unreduced model, asked the same questions, and every method's row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenreduce.evaluation import statistics
from tokenreduce.evaluation.result import RANDOM, REDUCER, UNREDUCED, MethodResult
from tokenreduce.evaluation.statistics import Changes, Estimate
from tokenreduce.reporting.discovery import Comparison
from tokenreduce.reporting.formatting import label, share, tokens

DOWNSAMPLED = "downsample"
"""The method by which VTC-Bench tells hard samples from easy ones."""

_SAME_BUDGET = 1.15
"""Methods whose layer means are this near are compared as of one budget."""


@dataclass(frozen=True)
class Hard:
    """VTC-Bench's group A: the score on samples that the unreduced model gets right, and the down-sampled one of about
    as many tokens wrong (arXiv 2510.07143)."""

    score: Estimate
    samples: int
    judge: str


@dataclass(frozen=True, eq=False)
class Row:
    """One method at one setting.

    key:      ``unreduced``, ``reducer`` or ``random``, its place in the comparison's result.
    series:   what its points are joined under and coloured by: the method, and settings other than how much it keeps.
    method:   its part of the comparison's result.
    budget:   the place of its layer mean among the study's, 0 for the unreduced model's.
    retained: the share of the unreduced score that is left.
    changes:  samples that it got right or wrong where the unreduced model did not; None for several runs.
    p_unreduced, p_random: of the paired differences to these, corrected by Holm over the study's methods.
    """

    key: str
    label: str
    series: str
    method: MethodResult
    comparison: Comparison
    budget: int = 0
    retained: Estimate | None = None
    changes: Changes | None = None
    p_unreduced: float | None = None
    p_random: float | None = None
    hard: Hard | None = None

    @property
    def score(self) -> float:
        return self.method.score.value

    @property
    def layer_mean(self) -> float:
        return self.method.visual_tokens.layer_mean

    @property
    def is_method(self) -> bool:
        return self.key == REDUCER


@dataclass(frozen=True, eq=False)
class Study:
    """One benchmark on one model, with a row a method: the unreduced one, then by budget, the best first."""

    benchmark: str
    model: str
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    notes: Sequence[str] = field(default=())

    @property
    def unreduced(self) -> Row:
        return self.rows[0]

    @property
    def methods(self) -> list[Row]:
        """The rows of reducers, without references."""
        return [row for row in self.rows if row.is_method]

    @property
    def series(self) -> list[str]:
        """Every reducer's series, sorted."""
        return sorted({row.series for row in self.methods})

    @property
    def categories(self) -> list[str]:
        return list(self.unreduced.method.categories)

    @property
    def budgets(self) -> dict[int, str]:
        """Every budget below the whole, in words."""
        total = self.unreduced.layer_mean
        words = {}
        for budget in sorted({row.budget for row in self.rows[1:]}):
            means = [row.layer_mean for row in self.rows if row.budget == budget and row is not self.unreduced]
            low, high = tokens(min(means)), tokens(max(means))
            left = sum(means) / len(means) / total if total else 0.0
            words[budget] = f"{low if low == high else f'{low}–{high}'} tokens, {share(left)}"  # noqa: RUF001
        return words

    @property
    def title(self) -> str:
        return f"{self.model} on {self.benchmark}"


def score_in(row: Row, category: str) -> Estimate | None:
    """A row's score in one category, where it has samples of it."""
    found = row.method.categories.get(category)
    return found.score if found else None


def difference_in(row: Row, category: str) -> Estimate | None:
    """A row's difference to the unreduced model in one category, where it has one."""
    found = row.method.categories.get(category)
    return found.difference_to_unreduced if found else None


def studies(comparisons: Iterable[Comparison]) -> list[Study]:
    """Comparisons by the unreduced run that they share, and by how many samples they took."""
    groups: dict[tuple[str, Any], list[Comparison]] = {}
    for comparison in comparisons:
        result = comparison.result
        groups.setdefault((result.unreduced.runs[0], result.settings.limit), []).append(comparison)
    return [_study(group) for group in groups.values()]


def _study(comparisons: Sequence[Comparison]) -> Study:
    first = comparisons[0]
    unreduced = Row(UNREDUCED, UNREDUCED, UNREDUCED, first.result.unreduced, first)
    rows = [
        _row(key, comparison)
        for comparison in comparisons
        for key in (REDUCER, RANDOM)
        if key in comparison.result.methods and not (key == REDUCER and _is_reference(comparison))
    ]
    rows = list({tuple(row.method.runs): row for row in rows}.values())  # methods share draws of the baseline
    rows = _named_apart(rows)
    rows = _with_budgets(rows, unreduced.layer_mean)
    rows = [replace(row, hard=_hard(row, rows)) if row.key != UNREDUCED else row for row in rows]
    rows = _corrected(rows)
    rows.sort(key=lambda row: (row.budget, -row.score, row.label))
    name = first.result.benchmark.name
    return Study(name, _model(first), [unreduced, *rows], comparisons, _notes(comparisons))


def _is_reference(comparison: Comparison) -> bool:
    """True if the method is the random baseline itself, which the comparison has as a row of more seeds anyway."""
    result = comparison.result
    return result.main.name == RANDOM and result.random is not None


def _row(key: str, comparison: Comparison) -> Row:
    method = comparison.result.methods[key]
    row = Row(key, label(method.name, method.knobs), method.name, method, comparison)
    if not comparison.answered:
        return row
    scores, plain = comparison.scores(key), comparison.scores(UNREDUCED)
    images = [record.image_id for record in comparison.answered]
    single = len(comparison.records[key]) == 1
    against_random = (
        statistics.difference_p_value(scores, comparison.scores(RANDOM), images)
        if key == REDUCER and comparison.result.random is not None
        else None
    )
    return replace(
        row,
        retained=statistics.ratio(scores, plain, images),
        changes=statistics.changes(scores, plain) if single else None,
        p_unreduced=statistics.difference_p_value(scores, plain, images),
        p_random=against_random,
    )


def _named_apart(rows: Sequence[Row]) -> list[Row]:
    """Labels and series with the settings that tell a method's rows apart, besides how much is kept."""
    named = []
    for row in rows:
        knobs = row.method.knobs
        if parts := knobs.get("reducers"):
            series = " + ".join(part["name"] for part in parts)
            named.append(replace(row, series=series))
            continue
        alike = [other.method.knobs for other in rows if other.key == row.key and other.series == row.series]
        varying = [
            name
            for name in knobs
            if name not in ("keep", "seeds") and len({repr(other.get(name)) for other in alike}) > 1
        ]
        words = "".join(f" {name}={knobs[name]}" for name in varying)
        how_much_only = "keep" not in knobs and len(varying) == 1
        series = row.series if how_much_only else row.series + words
        named.append(replace(row, label=row.label + words, series=series))
    return named


def _with_budgets(rows: Sequence[Row], total: float) -> list[Row]:
    """Rows with their budgets, the largest first: layer means that are near one another are one budget."""
    ordered = sorted(rows, key=lambda row: -row.layer_mean)
    budget, top, numbered = 0, total * _SAME_BUDGET, []
    for row in ordered:
        if not budget or row.layer_mean * _SAME_BUDGET < top:
            budget, top = budget + 1, row.layer_mean
        numbered.append(replace(row, budget=budget))
    return numbered


def _hard(row: Row, rows: Sequence[Row]) -> Hard | None:
    judges = [
        other for other in rows if other.is_method and other.method.name == DOWNSAMPLED and other.budget == row.budget
    ]
    if not judges or not row.comparison.answered:
        return None
    judge = min(judges, key=lambda other: abs(other.layer_mean - row.layer_mean))
    judged = dict(zip(_ids(judge.comparison), judge.comparison.scores(REDUCER), strict=True))
    scored = zip(row.comparison.answered, row.comparison.scores(row.key), strict=True)
    found = [
        (score, record.image_id)
        for record, score in scored
        if (record.score or 0) >= 0.5 and judged.get(record.id, 1.0) < 0.5
    ]
    if not found:
        return None
    score = statistics.score([score for score, _ in found], [image for _, image in found])
    return Hard(score, len(found), judge.label) if score else None


def _ids(comparison: Comparison) -> list[str]:
    return [record.id for record in comparison.answered]


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Rows whose p-values are corrected over all methods; the baseline is none of them."""
    unreduced = _holm([row.p_unreduced if row.is_method else None for row in rows])
    random = _holm([row.p_random for row in rows])
    return [
        replace(row, p_unreduced=one, p_random=other) for row, one, other in zip(rows, unreduced, random, strict=True)
    ]


def _holm(p_values: Sequence[float | None]) -> list[float | None]:
    corrected = iter(statistics.holm([each for each in p_values if each is not None]))
    return [None if each is None else next(corrected) for each in p_values]


def _model(comparison: Comparison) -> str:
    """The checkpoint's name, or its class where nothing else is known."""
    path = comparison.config.get("model", {}).get("path")
    known = comparison.result.run.identity.get("model", {})
    name = known.get("name") or (Path(str(path)).name if path else None)
    return str(name or known.get("class") or "an unnamed model")


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Notes on the samples behind the table that its reader must know."""
    counts = sorted({comparison.result.benchmark.samples for comparison in comparisons})
    notes = []
    if len(counts) > 1:
        notes.append(
            f"Rows are over {counts[0]} to {counts[-1]} samples: those that every run of a comparison answered."
        )
    for comparison in comparisons:
        benchmark = comparison.result.benchmark
        if benchmark.errors:
            first = benchmark.failed[0]
            notes.append(
                f"{comparison.folder.name} leaves out {benchmark.errors} samples without an answer, "
                f"the first {first.id}: {first.error}"
            )
    return notes
