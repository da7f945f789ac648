"""The result of a comparison, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenreduce.evaluation.comparison import UNREDUCED

Metrics = Mapping[str, Any]

NOT_MEASURED = "n/a"


def report(metrics: Metrics) -> RenderableType:
    """Everything that a run prints at its end."""
    return Group(results(metrics), categories(metrics), footnote(metrics))


def results(metrics: Metrics) -> Table:
    """One row a method: what it scores, and what it costs."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("method", no_wrap=True)
    table.add_column("score [dim]%[/dim]", justify="right", no_wrap=True)
    table.add_column("vs unreduced\n[dim]points[/dim]", justify="right", no_wrap=True)
    table.add_column("visual tokens\n[dim]kept / all[/dim]", justify="right", no_wrap=True)
    table.add_column("prefill FLOPs\n[dim]LLM   + vision[/dim]", justify="right", no_wrap=True)
    table.add_column("first token\n[dim]ms   ratio[/dim]", justify="right", no_wrap=True)
    table.add_column("peak memory", justify="right", no_wrap=True)
    for key, method in metrics["methods"].items():
        table.add_row(
            Text(label(method), style="bold" if key == "reducer" else ""),
            _score(method["score"]),
            _difference(method["difference_to_unreduced"]),
            _tokens(method["visual_tokens"]),
            _flops(method["prefill_flops"]),
            _first_token(method["time_to_first_token"], reference=key == UNREDUCED),
            _memory(method["peak_memory"]),
        )
    return table


def categories(metrics: Metrics) -> Table:
    """Scores by category, one row a method."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("score % in", no_wrap=True)
    for category in metrics["benchmark"]["categories"]:
        table.add_column(category, justify="right", no_wrap=True)
    for key, method in metrics["methods"].items():
        cells = [_score(category["score"]) for category in method["categories"].values()]
        table.add_row(Text(label(method), style="bold" if key == "reducer" else ""), *cells)
    return table


def footnote(metrics: Metrics) -> Text:
    """What the figures are about."""
    benchmark = metrics["benchmark"]
    lines = [
        f"{benchmark['name']}: {benchmark['samples']} questions about {benchmark['images']} images; "
        "± and [ ] are 95 % intervals, clustered by image"
    ]
    if benchmark["errors"]:
        first = benchmark["failed"][0]
        lines.append(
            f"{benchmark['errors']} samples could not be answered and are left out, first {first['id']}: {first['error']}"
        )
    return Text("\n".join(lines), style="dim")


def label(method: Mapping[str, Any]) -> str:
    """A method's name with how much it keeps: ``fopru_row keep=0.25``.

    >>> label({"name": "fopru_row", "knobs": {"keep": 0.25, "layer": -2}, "runs": ["fopru_row-5f1c"]})
    'fopru_row keep=0.25'
    """
    keep = method["knobs"].get("keep")
    several = f", {len(method['runs'])} seeds" if len(method["runs"]) > 1 else ""
    return method["name"] + (f" keep={keep}" if keep is not None else "") + several


def _score(estimate: Mapping[str, float | None]) -> str:
    value, low, high = (
        None if each is None else 100 * each for each in (estimate["value"], estimate["low"], estimate["high"])
    )
    if low is None or high is None:
        return f"{value:.1f}      "
    return f"{value:.1f} ±{max(high - value, value - low):4.1f}"


def _difference(estimate: Mapping[str, float | None] | None) -> str:
    if estimate is None:
        return ""
    if estimate["low"] is None or estimate["high"] is None:
        return _signed(estimate["value"])
    return f"{_signed(estimate['value'])} \\[{_signed(estimate['low'])}, {_signed(estimate['high'])}]"


def _signed(value: float | None) -> str:
    """In points, with a minus sign as long as the plus sign; what rounds to nothing has neither."""
    text = f"{100 * (value or 0):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _tokens(tokens: Mapping[str, float]) -> str:
    return f"{_count(tokens['kept'])} / {_count(tokens['total'])}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _flops(flops: Mapping[str, float]) -> str:
    return f"{flops['llm_ratio']:.2f}     {flops['total_ratio']:.2f}"


def _first_token(times: Mapping[str, Any] | None, reference: bool) -> str:
    if times is None:
        return NOT_MEASURED
    ratio = "" if reference else f"{times['ratio']['value']:.2f}"
    return f"{1000 * times['median']:.1f}   {ratio:>4}"


def _memory(peak: float | None) -> str:
    if peak is None:
        return NOT_MEASURED
    return f"{peak / 2**30:.2f} GiB" if peak >= 2**30 else f"{peak / 2**20:.0f} MiB"
