"""One function for every quantity, wherever it is shown; what was not measured is n/a."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenreduce.evaluation.result import Machine
from tokenreduce.evaluation.statistics import Estimate

NOT_MEASURED = "n/a"


def label(name: str, knobs: Mapping[str, Any]) -> str:
    """A method's name with how much it keeps, a ratio to three digits: ``fopru_row keep=0.25``.

    >>> label("fopru_row", {"keep": 0.25, "layer": -2})
    'fopru_row keep=0.25'
    >>> label("chain", {"reducers": [{"name": "pool", "keep": 64}, {"name": "random", "keep": 0.5}]})
    'pool keep=64 + random keep=0.5'
    >>> label("dart", {"keep": 2 / 9})
    'dart keep=0.222'
    """
    if parts := knobs.get("reducers"):
        return " + ".join(label(part["name"], part) for part in parts)
    keep = knobs.get("keep")
    keep = f"{keep:.3g}" if isinstance(keep, float) else keep
    return name + (f" keep={keep}" if keep is not None else "")


def percent(estimate: Estimate | None) -> str:
    """A share in [0, 1], such as a score, with half of its interval.

    >>> percent(Estimate(0.943, 0.93, 0.956)), percent(Estimate(0.8)), percent(None)
    ('94.3 ± 1.3', '80.0', 'n/a')
    """
    return NOT_MEASURED if estimate is None else f"{100 * estimate.value:.1f}{_half(estimate, 100)}"


def quantity(estimate: Estimate | None) -> str:
    """A benchmark's own figure, in whatever unit it has: ``1862.4 ± 31.2``."""
    return NOT_MEASURED if estimate is None else f"{estimate.value:.1f}{_half(estimate, 1)}"


def points(estimate: Estimate | None) -> str:
    """A difference of shares with its interval: ``−1.5 [−2.6, −0.4]``."""  # noqa: RUF002
    if estimate is None:
        return NOT_MEASURED
    if estimate.low is None or estimate.high is None:
        return signed(estimate.value)
    return f"{signed(estimate.value)} [{signed(estimate.low)}, {signed(estimate.high)}]"


def signed(value: float) -> str:
    """A difference of shares in points, with a minus sign as long as the plus sign; what rounds to 0 has neither."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def share(value: float) -> str:
    """
    >>> share(0.25), share(0.1111), share(1.0)
    ('25 %', '11.1 %', '100 %')
    """
    return f"{100 * value:.3g} %"


def tokens(count: float) -> str:
    """
    >>> tokens(36.0), tokens(35.52)
    ('36', '35.5')
    """
    return f"{count:.0f}" if count == round(count) else f"{count:.1f}"


def ratio(value: float | None) -> str:
    """A cost relative to the unreduced model's.

    >>> ratio(0.268), ratio(None)
    ('0.27', 'n/a')
    """
    return NOT_MEASURED if value is None else f"{value:.2f}"


def ratio_interval(estimate: Estimate) -> str:
    """
    >>> ratio_interval(Estimate(0.67, 0.65, 0.69)), ratio_interval(Estimate(0.67))
    ('0.67 [0.65, 0.69]', '0.67')
    """
    if estimate.low is None or estimate.high is None:
        return ratio(estimate.value)
    return f"{ratio(estimate.value)} [{ratio(estimate.low)}, {ratio(estimate.high)}]"


def milliseconds(seconds: float) -> str:
    """
    >>> milliseconds(0.0379)
    '37.9'
    """
    return f"{1000 * seconds:.1f}"


def size(number: float | None) -> str:
    """Bytes.

    >>> size(276480), size(5.3 * 2**20), size(644 << 20), size(None)
    ('270 KiB', '5.3 MiB', '644 MiB', 'n/a')
    """
    if number is None:
        return NOT_MEASURED
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 99.95 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def speeds(machine: Machine) -> str:
    """
    >>> speeds(Machine(flops=4e10, bytes=5e9))
    '40 GFLOP/s and 5 GB/s'
    """
    return f"{machine.flops / 1e9:.3g} GFLOP/s and {machine.bytes / 1e9:.3g} GB/s"


def probability(value: float | None) -> str:
    """A p-value.

    >>> probability(0.00002), probability(0.0312), probability(1.0)
    ('<0.001', '0.031', '1')
    """
    if value is None:
        return NOT_MEASURED
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def _half(estimate: Estimate, factor: int) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ± {factor * max(estimate.high - estimate.value, estimate.value - estimate.low):.1f}"
