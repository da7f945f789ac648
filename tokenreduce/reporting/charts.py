"""The report's figures: score against every currency, the ranking, categories, costs and times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokenreduce.evaluation.result import FirstToken, MethodResult
from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.reporting.columns import first_token_ratio
from tokenreduce.reporting.drawing import (
    BETTER,
    CHANCE,
    COLORS,
    FAINT,
    FRONT,
    GRID,
    INK,
    MARKERS,
    ROW,
    Chart,
    bars_axis,
    cost_axis,
    end_labels,
    pareto,
    styled,
    whiskers,
)
from tokenreduce.reporting.formatting import milliseconds, percent, points, share, signed, tokens
from tokenreduce.reporting.study import Row, Study, difference_in


@dataclass(frozen=True)
class Currency:
    """One cost of a method: an axis of :meth:`Painter.score_against`. ``value`` is relative to the unreduced model."""

    name: str
    tab: str
    axis: str
    value: Callable[[Row, Row], float | None]
    interval: Callable[[Row], Estimate | None] = lambda _: None


def _relative(cost: Callable[[MethodResult], float]) -> Callable[[Row, Row], float | None]:
    def value(row: Row, unreduced: Row) -> float | None:
        whole = cost(unreduced.method)
        return cost(row.method) / whole if whole else None

    return value


def _time(row: Row, unreduced: Row) -> float | None:
    ratio = first_token_ratio(row)
    return ratio.value if ratio else None


_kv_ratio = _relative(lambda method: method.kv_bytes)


CURRENCIES = (
    Currency(
        "layer_mean",
        "layer mean",
        "visual tokens, mean over decoder layers",
        _relative(lambda method: method.visual_tokens.layer_mean),
    ),
    Currency(
        "tokens",
        "tokens in",
        "visual tokens entering the language model",
        _relative(lambda method: method.visual_tokens.kept),
    ),
    Currency(
        "flops",
        "prefill FLOPs",
        "prefill FLOPs, vision tower included",
        _relative(lambda method: method.prefill_flops.total_ratio),
    ),
    Currency("kv", "KV cache", "bytes of the key-value cache", _kv_ratio),
    Currency("time", "time", "time to first token, measured", _time, first_token_ratio),
)


class Painter:
    """Draws one study's charts; ``series`` are all of the report, so that a method keeps its colour in every study."""

    def __init__(self, study: Study, series: Sequence[str]) -> None:
        self._study = study
        self._place = {name: place for place, name in enumerate(series)}

    def charts(self) -> list[Chart]:
        """Every chart that the study has the figures for."""
        if not self._study.methods:
            return []
        drawn = [self.score_against(each) for each in CURRENCIES]
        drawn += [self.ranking(), self.categories(), self.costs(), self.speed()]
        return [each for each in drawn if each is not None]

    def color(self, row: Row) -> str:
        if row.is_method:
            return COLORS[self._place[row.series] % len(COLORS)]
        return CHANCE if row is not self._study.unreduced else INK

    def marker(self, row: Row) -> str:
        return MARKERS[self._place[row.series] % len(MARKERS)] if row.is_method else "o"

    def series_id(self, row: Row) -> str:
        """The name of the row's series in ids."""
        return f"s{self._place[row.series]}" if row.is_method else row.key

    def score_against(self, currency: Currency) -> Chart | None:
        """Scores over what they cost, the cheaper to the right, with the Pareto front of the methods."""
        study, base = self._study, self._study.unreduced
        placed = [(row, value) for row in study.rows[1:] if (value := currency.value(row, base)) is not None]
        if not any(row.is_method for row, _ in placed):
            return None
        chart, axes = self._chart(
            f"score_{currency.name}",
            f"Score against {currency.tab}",
            "Error bars: 95 %, clustered by image. The shaded line is the Pareto front: no other method is both "
            "cheaper and better. Grey: as many tokens drawn at random.",
            (8.6, 4.6),
        )
        self._reference(axes)
        front = pareto([(value, row.score) for row, value in placed if row.is_method])
        axes.plot(*zip(*front, strict=True), color=FRONT, alpha=0.45, linewidth=8, solid_capstyle="round", zorder=1)
        groups: dict[str, list[tuple[Row, float]]] = {}
        for row, value in placed:
            groups.setdefault(row.series if row.is_method else row.key, []).append((row, value))
        ends = []
        for group in groups.values():
            group.sort(key=lambda pair: -pair[0].layer_mean)
            first, color = group[0][0], self.color(group[0][0])
            identity = self.series_id(first)
            style = "-" if first.is_method else (0, (1, 1.6))
            (line,) = axes.plot(
                [x for _, x in group], [100 * row.score for row, _ in group], color=color, lw=1.6, ls=style
            )
            line.set_gid(f"{identity}-line")
            for row, value in group:
                self._point(chart, axes, row, value, 100 * row.score, across=currency.interval(row))
            ends.append((group[-1], identity))
        cost_axis(axes, [value for _, value in placed])
        axes.set_xlabel(f"{currency.axis}, % of the unreduced model's   (cheaper \N{RIGHTWARDS ARROW})")
        axes.set_ylabel("score, %")
        labels = [(value, 100 * row.score, self._name(row), self.color(row), gid) for (row, value), gid in ends]
        labels.append(
            (axes.get_xlim()[1], 100 * base.score, f"unreduced {percent(Estimate(base.score))}", INK, base.key)
        )
        end_labels(axes, labels)
        return chart

    def ranking(self) -> Chart:
        """All methods by budget: scores, and what they are above chance."""
        study = self._study
        budgets = list(study.budgets.items())
        groups = [[row for row in study.rows[1:] if row.budget == budget] for budget, _ in budgets]
        height = ROW * sum(len(group) + 1.3 for group in groups) + 0.7
        with_random = any(row.method.difference_to_random for row in study.methods)
        with styled():
            figure = Figure(figsize=(8.6, height), layout="constrained")
            panels = figure.subplots(1, 2, sharey=True, squeeze=False, width_ratios=[3, 2 if with_random else 0.01])[0]
        chart = Chart(
            "ranking",
            "Ranking at equal budgets",
            "By mean tokens a layer. Filled on the right: better or worse than chance after Holm's correction for all "
            "methods (p < 0.05).",
            figure,
        )
        left, right = panels
        with styled():
            axis, names = 0.0, []
            for (_, words), group in zip(budgets, groups, strict=True):
                axis += 0.9
                left.text(0, axis, words, transform=left.get_yaxis_transform(), va="center", fontsize=9, color=FAINT)
                for each in panels:
                    each.axhline(axis + 0.45, color=GRID, linewidth=0.8)
                for row in group:
                    axis += 1
                    names.append((axis, row))
                    self._point(chart, left, row, 100 * row.score, axis, across=row.method.score, points_up=False)
                    self._above_chance(chart, right, row, axis)
                axis += 0.4
            for place, row in names:
                text = left.annotate(
                    row.label if row.is_method else self._name(row), (0, place), xycoords=left.get_yaxis_transform(),
                    xytext=(-8, 0), textcoords="offset points", ha="right", va="center", color=self.color(row),
                    fontweight="bold" if row.is_method else "normal", fontsize=9.5,
                )  # fmt: skip
                text.set_gid(f"{self.series_id(row)}-name-{self._place_of(row)}")
            left.axvline(100 * study.unreduced.score, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            left.set_ylim(axis + 0.3, 0.2)
            for each, label in ((left, "score, %  (dashed: unreduced)"), (right, "above random, points")):
                each.set_xlabel(label)
                each.grid(axis="x")
                each.grid(visible=False, axis="y")
                each.tick_params(left=False, labelleft=False)
                each.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            right.axvline(0, color=CHANCE, linewidth=1)
            right.set_visible(with_random)
        return chart

    def categories(self) -> Chart | None:
        """The loss of every method in every category, as a heat map."""
        rows, names = self._study.methods, self._study.categories
        if len(names) < 2:
            return None
        values = np.array([[_number(difference_in(row, name)) for name in names] for row in rows]) * 100
        limit = max(5.0, float(np.nan_to_num(np.abs(values)).max()))
        chart, axes = self._chart(
            "categories",
            "Where it hurts",
            "Difference to the unreduced model by category, in points.",
            (2.6 + 1.05 * len(names), 0.9 + ROW * len(rows)),
        )
        axes.imshow(values, cmap=BETTER, vmin=-limit, vmax=limit, aspect="auto")
        for (place, column), value in np.ndenumerate(values):
            dark = abs(value) > 0.62 * limit
            words = signed(value / 100) if np.isfinite(value) else ""
            text = axes.text(column, place, words, ha="center", va="center", fontsize=9)
            text.set_color("white" if dark else "#1f2328")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        for place in range(1, len(rows)):
            gap = rows[place].budget != rows[place - 1].budget
            axes.axhline(place - 0.5, color="white", linewidth=6 if gap else 1.5)
        for place in range(1, len(names)):
            axes.axvline(place - 0.5, color="white", linewidth=1.5)
        return chart

    def costs(self) -> Chart:
        """Prefill FLOPs of vision tower and language model, and the cache."""
        rows, base = self._study.rows, self._study.unreduced.method.prefill_flops
        whole = base.llm + base.vision
        chart, figure = self._rows_figure(
            "costs",
            "What is paid for",
            "Prefill FLOPs and the key-value cache of a sample, relative to the unreduced model's. The vision tower's "
            "share (pale) stays, unless a method acts before or inside it.",
            rows,
        )
        with styled():
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
            for place, row in enumerate(rows):
                flops, color = row.method.prefill_flops, self.color(row)
                vision, llm = flops.vision / whole, flops.llm / whole
                parts = [*left.barh(place, 100 * vision, color=color, alpha=0.3, height=0.62)]
                parts += left.barh(place, 100 * llm, left=100 * vision, color=color, height=0.62)
                tip = f"{row.label}\nvision {share(vision)}, language model {share(llm)} of the unreduced prefill"
                kv_ratio = _kv_ratio(row, self._study.unreduced)
                if kv_ratio is not None:
                    parts += right.barh(place, 100 * kv_ratio, color=color, height=0.62)
                    tip += f"\nKV cache {share(kv_ratio)}"
                self._mark(chart, row, "cost", parts, tip)
            self._row_names(left, rows)
            for axes, label in ((left, "prefill FLOPs, %: vision (pale) + language model"), (right, "KV cache, %")):
                bars_axis(axes, label)
        return chart

    def speed(self) -> Chart | None:
        """Times as the FLOPs promise them, and as they were measured."""
        timed = [(row, times) for row in self._study.rows if (times := row.method.time_to_first_token)]
        rows = [row for row, _ in timed]
        if not any(row.is_method for row in rows):
            return None
        chart, figure = self._rows_figure(
            "speed",
            "Is it really faster?",
            "Left: the measured time to first token and, as a ring, what prefill FLOPs promise; 95 % intervals of "
            "interleaved pairs. Right: what that time goes to. All relative to the unreduced model beside it.",
            rows,
        )
        with styled():
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
            for place, (row, times) in enumerate(timed):
                color, promise, taken = self.color(row), row.method.prefill_flops.total_ratio, times.ratio.value
                across = [100 * promise, 100 * taken]
                parts: list[Artist] = [*left.plot(across, [place, place], color=color, lw=1.4, alpha=0.3)]
                parts += left.plot(across[:1], [place], marker="o", ms=7, mfc="none", mec=color, ls="none")
                parts += whiskers(left, times.ratio, place, color)
                parts += left.plot(across[1:], [place], marker=self.marker(row), ms=7, color=color, ls="none")
                bars, words = self._split(right, row, times, place)
                tip = f"{row.label}\n{share(taken)} of the unreduced time; FLOPs promise {share(promise)}\n{words}"
                self._mark(chart, row, "speed", parts + bars, tip)
            self._row_names(left, rows)
            left.axvline(100, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            bars_axis(left, "time to first token, % of unreduced")
            bars_axis(right, "vision (pale), selection (dark), language model")
        return chart

    def _split(self, axes: Axes, row: Row, times: FirstToken, place: int) -> tuple[list[Artist], str]:
        """A bar of the parts of a time relative to the unreduced one, and the parts in words."""
        whole = (row.comparison.result.unreduced.time_to_first_token or times).median
        parts = {name: spread.median for name, spread in vars(times.parts).items()}
        shades = {"vision": (self.color(row), 0.3), "selection": (INK, 0.9)}
        start = 0.0
        drawn: list[Artist] = []
        for name, seconds in parts.items():
            color, alpha = shades.get(name, (self.color(row), 1.0))
            width = 100 * seconds / whole
            drawn += axes.barh(place, width, left=start, color=color, alpha=alpha, height=0.62)
            start += width
        return drawn, ", ".join(f"{name} {milliseconds(seconds)} ms" for name, seconds in parts.items())

    def _chart(self, name: str, title: str, caption: str, size: tuple[float, float]) -> tuple[Chart, Axes]:
        with styled():
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots()
        return Chart(name, title, caption, figure), axes

    def _rows_figure(self, name: str, title: str, caption: str, rows: Sequence[Row]) -> tuple[Chart, Figure]:
        with styled():
            figure = Figure(figsize=(8.6, 0.9 + ROW * len(rows)), layout="constrained")
        return Chart(name, title, caption, figure), figure

    def _reference(self, axes: Axes) -> None:
        """The unreduced score as a line with its interval."""
        score = self._study.unreduced.method.score
        axes.axhline(100 * score.value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if score.low is not None and score.high is not None:
            axes.axhspan(100 * score.low, 100 * score.high, color=INK, alpha=0.06, linewidth=0)

    def _point(
        self,
        chart: Chart,
        axes: Axes,
        row: Row,
        x: float,
        y: float,
        *,
        across: Estimate | None = None,
        points_up: bool = True,
    ) -> None:
        """A row's marker with its intervals: upwards its score's, across that of the axis."""
        with styled():
            color = self.color(row)
            parts: list[Artist] = whiskers(axes, across, y, color)
            score = row.method.score
            if points_up and score.low is not None and score.high is not None:
                parts += axes.plot([x, x], [100 * score.low, 100 * score.high], color=color, lw=1.1, alpha=0.55)
            size = 7 if row.is_method else 5
            parts += axes.plot(
                [x], [y], marker=self.marker(row), ms=size, color=color, mec="white", mew=0.8, ls="none", zorder=5
            )
            self._mark(chart, row, f"at-{len(chart.tips)}", parts, self.tip(row))

    def tip(self, row: Row) -> str:
        """The text of a row's marks when they are pointed at."""
        method, visual = row.method, row.method.visual_tokens
        lines = [row.label, f"score {percent(method.score)} %"]
        if method.difference_to_unreduced is not None:
            lines.append(f"vs unreduced {points(method.difference_to_unreduced)}")
        kept, total, layer_mean = map(tokens, (visual.kept, visual.total, visual.layer_mean))
        lines.append(f"{kept} of {total} tokens in, layer mean {layer_mean}")
        return "\n".join(lines)

    def _mark(self, chart: Chart, row: Row, name: str, parts: Sequence[Artist], tip: str) -> None:
        for number, part in enumerate(parts):
            gid = f"{self.series_id(row)}-row-{self._place_of(row)}-{name}-{number}"
            part.set_gid(gid)
            chart.tips[gid] = tip

    def _above_chance(self, chart: Chart, axes: Axes, row: Row, place: float) -> None:
        difference = row.method.difference_to_random
        if difference is None:
            return
        color, sure = self.color(row), row.p_random is not None and row.p_random < 0.05
        parts = whiskers(axes, difference, place, color)
        parts += axes.plot(
            [100 * difference.value], [place], marker=self.marker(row), ms=6.5, ls="none", mec=color,
            mfc=color if sure else "white", zorder=5,
        )  # fmt: skip
        self._mark(chart, row, "chance", parts, f"{row.label}\nvs random {points(difference)} points")

    def _row_names(self, axes: Axes, rows: Sequence[Row]) -> None:
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        for text, row in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_color(self.color(row))
            text.set_gid(f"{self.series_id(row)}-name-{self._place_of(row)}")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        for place in range(1, len(rows)):
            if rows[place].budget != rows[place - 1].budget:
                for each in axes.figure.axes:
                    each.axhline(place - 0.5, color=GRID, linewidth=0.8)

    def _name(self, row: Row) -> str:
        return row.series if row.is_method else row.key

    def _place_of(self, row: Row) -> int:
        return next(number for number, each in enumerate(self._study.rows) if each is row)


def _number(estimate: Estimate | None) -> float:
    return np.nan if estimate is None else estimate.value
