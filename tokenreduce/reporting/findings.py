"""The findings of a study, in sentences that claim no more than its intervals do."""

from __future__ import annotations

from collections.abc import Sequence

from tokenreduce.reporting.columns import first_token_ratio
from tokenreduce.reporting.formatting import percent, points, ratio, ratio_interval, signed, speeds
from tokenreduce.reporting.study import Row, Study, difference_in

_SURE = 0.05
_NAMED = 4
"""At most so many methods are named in a sentence."""


def findings(study: Study) -> list[str]:
    """The main results, the most important first."""
    found = [_best(study, budget, words) for budget, words in study.budgets.items()]
    return [each for each in (*found, _chance(study), _hardest(study), faster(study)) if each]


def faster(study: Study) -> str:
    """Say how many methods reach the first token earlier, where that was measured."""
    timed = [(row, taken) for row in study.methods if (taken := first_token_ratio(row))]
    if not timed:
        return ""
    sure = [row for row, taken in timed if taken.high is not None and taken.high < 1]
    best, fastest = min(timed, key=lambda pair: pair[1].value)
    start = (
        f"{len(sure)} of {len(timed)} settings are measurably faster to the first token"
        if sure
        else f"None of {len(timed)} settings is measurably faster to the first token"
    )
    return (
        f"{start}. The fastest is {best.label}: {ratio_interval(fastest)} of the unreduced time, "
        f"where prefill FLOPs promise {ratio(best.method.prefill_flops.total_ratio)}."
    )


def bound(study: Study) -> str:
    """Say where the machine waits for memory, if that was measured: there fewer tokens save no time."""
    machine = study.unreduced.comparison.result.machine
    bounds = [row.method.roofline for row in study.rows if row.method.roofline is not None]
    if machine is None or not bounds:
        return ""
    waiting = [each for each in bounds if each.prefill.memory_bound]
    return (
        f"This machine does {speeds(machine)}: below {machine.break_even_tokens:.0f} tokens a prompt, prefill at batch "
        f"1 waits for weights, and fewer tokens save nothing. That holds for {len(waiting)} of {len(bounds)} rows."
    )


def _best(study: Study, budget: int, words: str) -> str:
    """The highest score of one budget, and whether it is told apart from the next and from the unreduced model."""
    ranked = [row for row in study.methods if row.budget == budget]
    if len(ranked) < 2:
        return ""
    first = ranked[0]
    difference = first.method.difference_to_unreduced
    apart = (
        f"{points(difference)} points to unreduced"
        if first.p_unreduced is not None and first.p_unreduced < _SURE
        else f"not told apart from unreduced ({points(difference)} points)"
    )
    return f"At {words}: {first.label} scores highest of {len(ranked)}, {percent(first.method.score)} %, {apart}."


def _chance(study: Study) -> str:
    """Say how many methods choose better than chance does."""
    tested = [row for row in study.methods if row.p_random is not None]
    if not tested:
        return ""
    sure = [row for row in tested if (row.p_random or 0) < _SURE]
    differences = [(row, row.method.difference_to_random) for row in sure]
    better = [row for row, difference in differences if difference and difference.value > 0]
    worse = [row for row, difference in differences if difference and difference.value < 0]
    text = f"{len(better)} of {len(tested)} settings beat as many tokens drawn at random"
    return text + (f"; worse than chance: {_names(worse)}." if worse else "; none is worse.")


def _hardest(study: Study) -> str:
    """The category that reduction costs most."""
    names = study.categories
    if len(names) < 2 or not study.methods:
        return ""
    known = {name: [each.value for row in study.methods if (each := difference_in(row, name))] for name in names}
    means = {name: sum(values) / len(values) for name, values in known.items() if values}
    if len(means) < 2:
        return ""
    most, least = (pick(means, key=lambda name: means[name]) for pick in (min, max))
    return (
        f"{most.capitalize()} suffers most, {signed(means[most])} points on average over all methods; "
        f"{least} least, {signed(means[least])}."
    )


def _names(rows: Sequence[Row]) -> str:
    named = ", ".join(row.label for row in rows[:_NAMED])
    return named + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
