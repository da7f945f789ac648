"""What a study shows, in sentences that claim no more than its intervals do."""

from __future__ import annotations

from collections.abc import Sequence

from tokenreduce.reporting.charts import category_difference
from tokenreduce.reporting.columns import first_token_ratio
from tokenreduce.reporting.formatting import percent, points, signed
from tokenreduce.reporting.study import Row, Study

_SURE = 0.05
_NAMED = 4
"""At most so many methods are named in a sentence."""


def findings(study: Study) -> list[str]:
    """The main results, the most important first."""
    found = [_best(study, budget, words) for budget, words in study.budgets.items()]
    return [each for each in (*found, _chance(study), _hardest(study), faster(study)) if each]


def faster(study: Study) -> str:
    """Whether reducing tokens made the first token come earlier, where that was measured."""
    timed = [(row, ratio) for row in study.methods if (ratio := first_token_ratio(row))]
    if not timed:
        return ""
    sure = [row for row, ratio in timed if ratio["high"] is not None and ratio["high"] < 1]
    best, ratio = min(timed, key=lambda pair: pair[1]["value"] or 1.0)
    promise = best.figures["prefill_flops"]["total_ratio"]
    start = (
        f"{len(sure)} of {len(timed)} settings are measurably faster to the first token"
        if sure
        else f"None of {len(timed)} settings is measurably faster to the first token"
    )
    return (
        f"{start}. The fastest is {best.label}: {ratio['value']:.2f} of the unreduced time "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}], where prefill FLOPs promise {promise:.2f}."
    )


def bound(study: Study) -> str:
    """Whether the machine waits for memory at these lengths, where it was measured: then fewer tokens save no time."""
    metrics = study.unreduced.comparison.metrics
    rows = [row for row in study.rows if row.figures.get("roofline")]
    if not metrics.get("machine") or not rows:
        return ""
    waiting = [row for row in rows if row.figures["roofline"]["prefill"]["memory_bound"]]
    machine = metrics["machine"]
    return (
        f"This machine does {machine['flops'] / 1e9:.0f} GFLOP/s and moves {machine['bytes'] / 1e9:.0f} GB/s: below "
        f"{machine['break_even_tokens']:.0f} tokens a prompt, prefill at batch 1 waits for weights, and fewer tokens "
        f"save nothing. That holds for {len(waiting)} of {len(rows)} rows."
    )


def _best(study: Study, budget: int, words: str) -> str:
    """The highest score of one budget, and whether it is told apart from the next and from the unreduced model."""
    ranked = [row for row in study.methods if row.budget == budget]
    if len(ranked) < 2:
        return ""
    first = ranked[0]
    difference = first.figures["difference_to_unreduced"]
    apart = (
        f"{points(difference)} points to unreduced"
        if first.p_unreduced is not None and first.p_unreduced < _SURE
        else f"not told apart from unreduced ({points(difference)} points)"
    )
    return f"At {words}: {first.label} scores highest of {len(ranked)}, {percent(first.figures['score'])} %, {apart}."


def _chance(study: Study) -> str:
    """How many methods choose better than chance does."""
    tested = [row for row in study.methods if row.p_random is not None]
    if not tested:
        return ""
    sure = [row for row in tested if (row.p_random or 0) < _SURE]
    better = [row for row in sure if row.figures["difference_to_random"]["value"] > 0]
    worse = [row for row in sure if row.figures["difference_to_random"]["value"] < 0]
    text = f"{len(better)} of {len(tested)} settings beat as many tokens drawn at random"
    return text + (f"; worse than chance: {_names(worse)}." if worse else "; none is worse.")


def _hardest(study: Study) -> str:
    """The category that reduction costs most."""
    names = study.categories
    if len(names) < 2 or not study.methods:
        return ""
    means = {name: sum(category_difference(row, name) for row in study.methods) / len(study.methods) for name in names}
    most, least = (pick(means, key=lambda name: means[name]) for pick in (min, max))
    return (
        f"{most.capitalize()} suffers most, {signed(means[most])} points on average over all methods; "
        f"{least} least, {signed(means[least])}."
    )


def _names(rows: Sequence[Row]) -> str:
    named = ", ".join(row.label for row in rows[:_NAMED])
    return named + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
