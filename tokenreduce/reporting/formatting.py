"""Numbers as a reader wants them: points, percent, ± and [ ], bytes; what was not measured is said to be so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tokenreduce.evaluation.statistics import Estimate

NOT_MEASURED = "n/a"

Interval = Mapping[str, float | None]
"""An estimate as ``metrics.json`` has it."""


def plain(estimate: Estimate | None) -> Interval | None:
    """An estimate as ``metrics.json`` would have it."""
    return None if estimate is None else asdict(estimate)


def percent(estimate: Interval | None) -> str:
    """``94.3 ± 1.3``, of a share in [0, 1].

    >>> percent({"value": 0.943, "low": 0.93, "high": 0.956})
    '94.3 ± 1.3'
    """
    if estimate is None or estimate["value"] is None:
        return NOT_MEASURED
    return f"{100 * estimate['value']:.1f}{_half(estimate, 100)}"


def points(estimate: Interval | None) -> str:
    """``−1.5 [−2.6, −0.4]``, of a difference of shares."""  # noqa: RUF002
    if estimate is None or estimate["value"] is None:
        return NOT_MEASURED
    if estimate["low"] is None or estimate["high"] is None:
        return signed(estimate["value"])
    return f"{signed(estimate['value'])} [{signed(estimate['low'])}, {signed(estimate['high'])}]"


def signed(value: float | None) -> str:
    """In points, with a minus sign as long as the plus sign; what rounds to nothing has neither."""
    text = f"{100 * (value or 0):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def count(value: float) -> str:
    """
    >>> count(36.0), count(35.52)
    ('36', '35.5')
    """
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def size(number: float | None) -> str:
    """Bytes.

    >>> size(276480), size(644 << 20), size(None)
    ('270 KiB', '644 MiB', 'n/a')
    """
    if number is None:
        return NOT_MEASURED
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 99.95 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def quantity(estimate: Interval | None) -> str:
    """``1862.4 ± 31.2``, in whatever unit it has."""
    if estimate is None or estimate["value"] is None:
        return NOT_MEASURED
    return f"{estimate['value']:.1f}{_half(estimate, 1)}"


def probability(value: float | None) -> str:
    """
    >>> probability(0.00002), probability(0.0312), probability(1.0)
    ('<0.001', '0.031', '1')
    """
    if value is None:
        return NOT_MEASURED
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def measured(value: Any, form: str, factor: float = 1.0) -> str:
    """A number in ``form``, or that there is none."""
    return NOT_MEASURED if value is None else format(factor * value, form)


def _half(estimate: Interval, factor: int) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None or low is None or high is None:
        return ""
    return f" ± {factor * max(high - value, value - low):.1f}"
