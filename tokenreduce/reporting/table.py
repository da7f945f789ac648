"""The result of a comparison, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenreduce.evaluation.comparison import RANDOM, REDUCER, UNREDUCED

Metrics = Mapping[str, Any]

NOT_MEASURED = "n/a"

OVERHEAD = 3
"""A prefill that takes so many times what the roofline allows is mostly overhead."""


def summary(metrics: Metrics) -> RenderableType:
    """Everything that a run prints at its end."""
    return Group(results(metrics), categories(metrics), *measures(metrics), costs(metrics), footnote(metrics))


def results(metrics: Metrics) -> Table:
    """One row a method: what it scores, and what it costs."""
    table = _results_table()
    for key, method in metrics["methods"].items():
        table.add_row(*_results_row(key, method))
    return table


def overview(comparisons: Sequence[Metrics]) -> Table:
    """One row a comparison of a sweep, below the unreduced model that it is compared with."""
    table = _results_table()
    baseline = None
    for metrics in comparisons:
        methods = metrics["methods"]
        if methods[UNREDUCED]["runs"] != baseline:
            baseline = methods[UNREDUCED]["runs"]
            table.add_row(*_results_row(UNREDUCED, methods[UNREDUCED]))
        if REDUCER in methods:
            table.add_row(*_results_row(REDUCER, methods[REDUCER]))
    return table


def _results_table() -> Table:
    table = _table("method")
    table.add_column("score [dim]%[/dim]", justify="right", no_wrap=True)
    table.add_column("vs unreduced\n[dim]points[/dim]", justify="right", no_wrap=True)
    table.add_column("visual tokens\n[dim]kept / all[/dim]", justify="right", no_wrap=True)
    table.add_column("prefill FLOPs\n[dim]LLM  + vision[/dim]", justify="right", no_wrap=True)
    table.add_column("first token\n[dim]ms  ratio[/dim]", justify="right", no_wrap=True)
    table.add_column("peak\n[dim]memory[/dim]", justify="right", no_wrap=True)
    return table


def _results_row(key: str, method: Metrics) -> list[RenderableType]:
    return [
        _name(key, method),
        _score(method["score"]),
        _difference(method["difference_to_unreduced"]),
        _tokens(method["visual_tokens"]),
        _flops(method["prefill_flops"]),
        _first_token(method["time_to_first_token"]),
        _memory(method["peak_memory"]),
    ]


def categories(metrics: Metrics) -> Table:
    """Scores by category, one row a method."""
    table = _table("score % in")
    for category in metrics["benchmark"]["categories"]:
        table.add_column(category, justify="right", no_wrap=True)
    for key, method in metrics["methods"].items():
        cells = [_score(category["score"]) for category in method["categories"].values()]
        table.add_row(_name(key, method), *cells)
    return table


def measures(metrics: Metrics) -> list[Table]:
    """What the benchmark computes of all answers together, in its own units; no table where it computes nothing."""
    names = list(metrics["methods"][UNREDUCED].get("measures", {}))
    if not names:
        return []
    table = _table(metrics["benchmark"]["name"])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for key, method in metrics["methods"].items():
        table.add_row(_name(key, method), *(_measure(method["measures"][name]) for name in names))
    return [table]


def costs(metrics: Metrics) -> Table:
    """What every method spends inside the language model, and where its time goes."""
    table = _table("mean cost, median time")
    for name, unit in (
        ("layer mean", "tokens"),
        ("KV cache", ""),
        ("vision", "ms"),
        ("selection", "ms"),
        ("LLM prefill", "ms  at best"),
        ("each further token", "ms  ratio"),
    ):
        table.add_column(f"{name}\n[dim]{unit}[/dim]", justify="right", no_wrap=True)
    for key, method in metrics["methods"].items():
        tokens, kv_bytes = _count(method["visual_tokens"]["layer_mean"]), _memory(method.get("kv_bytes"))
        table.add_row(_name(key, method), tokens, kv_bytes, *_times(method))
    return table


def footnote(metrics: Metrics) -> Text:
    """What the figures are about."""
    benchmark = metrics["benchmark"]
    lines = [
        f"{benchmark['name']}: {benchmark['samples']} questions about {benchmark['images']} images; "
        "± and [ ] are 95 % intervals, clustered by image"
    ]
    if budget := metrics.get("budget"):
        unit = {"tokens": "tokens entering", "layer_mean": "tokens, mean over layers", "flops": "FLOPs of prefill"}
        share = budget["asked"] / budget["whole"]
        lines.append(
            f"budget: {budget['asked']:.4g} {unit[budget['currency']]} ({100 * share:.3g} % of unreduced); "
            f"the knob comes to {budget['expected']:.4g}"
        )
    if (seeds := len(metrics["methods"].get(RANDOM, {"runs": ()})["runs"])) > 1:
        lines.append(f"{RANDOM} is the mean of {seeds} seeds")
    if benchmark["errors"]:
        first = benchmark["failed"][0]
        lines.append(
            f"left out: {benchmark['errors']} samples without an answer, first {first['id']}: {first['error']}"
        )
    return Text("\n".join([*lines, *_speed_limits(metrics)]), style="dim")


def label(method: Mapping[str, Any]) -> str:
    """A method's name with how much it keeps, a ratio to three digits: ``fopru_row keep=0.25``.

    >>> label({"name": "fopru_row", "knobs": {"keep": 0.25, "layer": -2}, "runs": ["fopru_row-5f1c"]})
    'fopru_row keep=0.25'
    >>> label({"name": "chain", "knobs": {"reducers": [{"name": "pool", "keep": 64}, {"name": "random", "keep": 0.5}]}})
    'pool keep=64 + random keep=0.5'
    >>> label({"name": "dart", "knobs": {"keep": 2 / 9}})
    'dart keep=0.222'
    """
    if parts := method["knobs"].get("reducers"):
        return " + ".join(label({"name": part["name"], "knobs": part}) for part in parts)
    keep = method["knobs"].get("keep")
    keep = f"{keep:.3g}" if isinstance(keep, float) else keep
    return method["name"] + (f" keep={keep}" if keep is not None else "")


def _table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    return table


def _name(key: str, method: Mapping[str, Any]) -> Text:
    return Text(UNREDUCED if key == UNREDUCED else label(method), style="bold" if key == REDUCER else "")


def _score(estimate: Mapping[str, float | None]) -> str:
    return _measure({bound: None if value is None else 100 * value for bound, value in estimate.items()})


def _measure(estimate: Mapping[str, Any]) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return NOT_MEASURED
    half = "" if low is None or high is None else f" ±{max(high - value, value - low):4.1f}"
    return f"{value:.1f}{half}"


def _difference(estimate: Mapping[str, float | None] | None) -> str:
    if estimate is None:
        return ""
    if estimate["low"] is None or estimate["high"] is None:
        return _signed(estimate["value"])
    return f"{_signed(estimate['value'])} \\[{_signed(estimate['low'])}, {_signed(estimate['high'])}]"


def _signed(value: float | None) -> str:
    """In points, with a minus sign as long as the plus sign; what rounds to nothing has neither."""
    text = f"{100 * (value or 0):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def _tokens(tokens: Mapping[str, float]) -> str:
    return f"{_count(tokens['kept'])} / {_count(tokens['total'])}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _flops(flops: Mapping[str, float]) -> str:
    return f"{flops['llm_ratio']:.2f}      {flops['total_ratio']:.2f}"


def _first_token(times: Mapping[str, Any] | None) -> str:
    if times is None:
        return NOT_MEASURED
    return f"{1000 * times['median']:.1f}   {times['ratio']['value']:.2f}"


def _speed_limits(metrics: Metrics) -> list[str]:
    """Why fewer tokens save time on this machine, or do not."""
    machine, unreduced = metrics.get("machine"), metrics["methods"][UNREDUCED]
    if not machine:
        return []
    speeds = f"{machine['flops'] / 1e9:.3g} GFLOP/s and {machine['bytes'] / 1e9:.3g} GB/s"
    least = machine["break_even_tokens"]
    lines = [f"this machine does {speeds}: prefill of less than {least:.0f} tokens is memory-bound"]
    if bound := [_name(key, method).plain for key, method in metrics["methods"].items() if _memory_bound(method)]:
        lines.append(f"memory-bound, so that fewer tokens save no time: {', '.join(bound)}")
    taken = unreduced["time_to_first_token"]["parts"]["llm"]["median"] / unreduced["roofline"]["prefill"]["seconds"]
    if taken > OVERHEAD:
        lines.append(
            f"unreduced prefill takes {taken:.1f} times the best case: mostly overhead, which no reducer shortens"
        )
    return lines


def _times(method: Metrics) -> list[str]:
    """Vision, selection, LLM prefill with its best case, and decoding."""
    first, decode, bounds = (method.get(name) for name in ("time_to_first_token", "decode_per_token", "roofline"))
    if first is None or decode is None or bounds is None:
        return [NOT_MEASURED] * 4
    vision, selection, llm = (f"{1000 * first['parts'][name]['median']:.1f}" for name in ("vision", "selection", "llm"))
    best = f"{1000 * bounds['prefill']['seconds']:.1f}"
    return [vision, selection, f"{llm}  {best:>7}", f"{1000 * decode['median']:.1f}   {decode['ratio']['value']:.2f}"]


def _memory_bound(method: Metrics) -> bool:
    return bool(method.get("roofline") and method["roofline"]["prefill"]["memory_bound"])


def _memory(peak: float | None) -> str:
    if peak is None:
        return NOT_MEASURED
    if peak < 2**20:
        return f"{peak / 2**10:.0f} KiB"
    return f"{peak / 2**30:.2f} GiB" if peak >= 2**30 else f"{peak / 2**20:.0f} MiB"
