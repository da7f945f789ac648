"""The result of a comparison, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tokenreduce.evaluation.result import RANDOM, REDUCER, UNREDUCED, MethodResult, Result, Timed
from tokenreduce.reporting.formatting import (
    NOT_MEASURED,
    label,
    milliseconds,
    percent,
    points,
    quantity,
    ratio,
    share,
    size,
    speeds,
    tokens,
)

OVERHEAD = 3
"""A prefill that takes so many times what the roofline allows is mostly overhead."""

_CURRENCIES = {"tokens": "tokens entering", "layer_mean": "tokens, mean over layers", "flops": "FLOPs of prefill"}


def summary(result: Result) -> RenderableType:
    """Everything that a run prints at its end."""
    return Group(results(result), categories(result), *measures(result), costs(result), footnote(result))


def results(result: Result) -> Table:
    """One row a method: what it scores, and what it costs."""
    table = _results_table()
    for key, method in result.methods.items():
        table.add_row(*_results_row(key, method))
    return table


def overview(comparisons: Sequence[Result]) -> Table:
    """One row a comparison of a sweep, below the unreduced model that it is compared with."""
    table = _results_table()
    baseline = None
    for result in comparisons:
        if result.unreduced.runs != baseline:
            baseline = result.unreduced.runs
            table.add_row(*_results_row(UNREDUCED, result.unreduced))
        if result.reducer is not None:
            table.add_row(*_results_row(REDUCER, result.reducer))
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


def _results_row(key: str, method: MethodResult) -> list[RenderableType]:
    visual, flops = method.visual_tokens, method.prefill_flops
    return [
        _name(key, method),
        percent(method.score),
        "" if method.difference_to_unreduced is None else escape(points(method.difference_to_unreduced)),
        f"{tokens(visual.kept)} / {tokens(visual.total)}",
        f"{ratio(flops.llm_ratio)}      {ratio(flops.total_ratio)}",
        _time(method.time_to_first_token),
        size(method.peak_memory),
    ]


def categories(result: Result) -> Table:
    """Scores by category, one row a method."""
    table = _table("score % in")
    for category in result.benchmark.categories:
        table.add_column(category, justify="right", no_wrap=True)
    for key, method in result.methods.items():
        table.add_row(_name(key, method), *(percent(category.score) for category in method.categories.values()))
    return table


def measures(result: Result) -> list[Table]:
    """The benchmark's own figures of all answers together, in its own units; no table where it has none."""
    if not result.unreduced.measures:
        return []
    table = _table(result.benchmark.name)
    for name in result.unreduced.measures:
        table.add_column(name, justify="right", no_wrap=True)
    for key, method in result.methods.items():
        table.add_row(_name(key, method), *map(quantity, method.measures.values()))
    return [table]


def costs(result: Result) -> Table:
    """The cost of every method inside the language model, and the parts of its time."""
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
    for key, method in result.methods.items():
        layer_mean, kv_cache = tokens(method.visual_tokens.layer_mean), size(method.kv_bytes)
        table.add_row(_name(key, method), layer_mean, kv_cache, *_times(method))
    return table


def footnote(result: Result) -> Text:
    """Notes on the figures: benchmark, budget, seeds, samples left out, and the machine."""
    benchmark = result.benchmark
    lines = [
        f"{benchmark.name}: {benchmark.samples} questions about {benchmark.images} images; "
        "± and [ ] are 95 % intervals, clustered by image"
    ]
    if budget := result.budget:
        lines.append(
            f"budget: {budget.asked:.4g} {_CURRENCIES[budget.currency]} ({share(budget.asked / budget.whole)} of "
            f"unreduced); the knob comes to {budget.expected:.4g}"
        )
    if result.random is not None and len(result.random.runs) > 1:
        lines.append(f"{RANDOM} is the mean of {len(result.random.runs)} seeds")
    if benchmark.errors:
        first = benchmark.failed[0]
        lines.append(f"left out: {benchmark.errors} samples without an answer, first {first.id}: {first.error}")
    return Text("\n".join([*lines, *_speed_limits(result)]), style="dim")


def _table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    return table


def _name(key: str, method: MethodResult) -> Text:
    name = UNREDUCED if key == UNREDUCED else label(method.name, method.knobs)
    return Text(name, style="bold" if key == REDUCER else "")


def _time(times: Timed | None) -> str:
    return NOT_MEASURED if times is None else f"{milliseconds(times.median)}   {ratio(times.ratio.value)}"


def _speed_limits(result: Result) -> list[str]:
    """The reasons why fewer tokens save time on this machine, or do not."""
    machine, unreduced = result.machine, result.unreduced
    if machine is None:
        return []
    least = machine.break_even_tokens
    lines = [f"this machine does {speeds(machine)}: prefill of less than {least:.0f} tokens is memory-bound"]
    if bound := [_name(key, method).plain for key, method in result.methods.items() if _memory_bound(method)]:
        lines.append(f"memory-bound, so that fewer tokens save no time: {', '.join(bound)}")
    if unreduced.time_to_first_token is not None and unreduced.roofline is not None:
        taken = unreduced.time_to_first_token.parts.llm.median / unreduced.roofline.prefill.seconds
        if taken > OVERHEAD:
            lines.append(
                f"unreduced prefill takes {taken:.1f} times the best case: mostly overhead, which no reducer shortens"
            )
    return lines


def _times(method: MethodResult) -> list[str]:
    """Vision, selection, LLM prefill with its best case, and decoding."""
    first, roofline = method.time_to_first_token, method.roofline
    if first is None or roofline is None:
        return [NOT_MEASURED] * 4
    vision, selection, llm = (
        milliseconds(part.median) for part in (first.parts.vision, first.parts.selection, first.parts.llm)
    )
    best = milliseconds(roofline.prefill.seconds)
    return [vision, selection, f"{llm}  {best:>7}", _time(method.decode_per_token)]


def _memory_bound(method: MethodResult) -> bool:
    return method.roofline is not None and method.roofline.prefill.memory_bound
