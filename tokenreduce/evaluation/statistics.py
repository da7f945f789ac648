"""Estimates with 95 % intervals that know that questions about one image are not independent.

Everything here is one estimator: the mean over samples, with the cluster-robust variance of a ratio (Liang and Zeger
1986; for evaluations Miller 2024, arXiv 2411.00640, section 2.2) over images and Student's t with images - 1 degrees
of freedom. With one sample an image it is the textbook one-sample t interval; on differences, the paired one. It agrees
with a bootstrap that draws whole images (the tests hold it to scipy's), and needs neither resampling nor a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Name = TypeVar("Name", bound=Hashable)

CONFIDENCE = 0.95
JACKKNIFE_GROUPS = 20


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; ``low`` and ``high`` are None where there are fewer than two images."""

    value: float
    low: float | None = None
    high: float | None = None


def mean(values: ArrayLike, clusters: Sequence[str]) -> Estimate | None:
    """The mean with its interval clustered by ``clusters``; None of no values."""
    array = np.asarray(values, dtype=float)
    if len(array) != len(clusters):
        raise ValueError(f"{len(array)} values for {len(clusters)} samples: give one of each")
    if not len(array):
        return None
    center = float(array.mean())
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    residuals = np.bincount(member, array - center)
    groups = len(residuals)
    if groups < 2:
        return Estimate(center)
    error = np.sqrt(groups / (groups - 1) * np.sum(residuals**2)) / len(array)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, groups - 1) * error)
    return Estimate(center, center - half, center + half)


def score(values: ArrayLike, clusters: Sequence[str]) -> Estimate | None:
    """The mean of scores in [0, 1]: as :func:`mean`, but never outside [0, 1].

    Images that all score alike give no variance to estimate from, yet no certainty: the exact (Clopper-Pearson)
    interval with every image counted as one observation stands in.
    """
    estimate = mean(values, clusters)
    if estimate is None or estimate.low is None or estimate.high is None:
        return estimate
    if np.isclose(estimate.low, estimate.high, rtol=0, atol=1e-12):
        images = len(set(clusters))
        exact = stats.binomtest(round(estimate.value * images), images).proportion_ci(CONFIDENCE)
        return Estimate(estimate.value, min(estimate.value, exact.low), max(estimate.value, exact.high))
    return Estimate(estimate.value, max(0.0, estimate.low), min(1.0, estimate.high))


def difference(values: ArrayLike, others: ArrayLike, clusters: Sequence[str]) -> Estimate | None:
    """The mean of ``values - others``, paired by sample."""
    return mean(np.asarray(values, dtype=float) - np.asarray(others, dtype=float), clusters)


def difference_p_value(values: ArrayLike, others: ArrayLike, clusters: Sequence[str]) -> float | None:
    """The probability of a difference at least this large if there is none: the test that :func:`difference` is the
    interval of. None of fewer than two images."""
    estimate = difference(values, others, clusters)
    if estimate is None or estimate.low is None:
        return None
    freedom = len(set(clusters)) - 1
    error = (estimate.value - estimate.low) / stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    if error == 0:
        return float(estimate.value == 0)
    return float(2 * stats.t.sf(abs(estimate.value) / error, freedom))


def ratio(values: ArrayLike, others: ArrayLike, clusters: Sequence[str]) -> Estimate | None:
    """``sum(values) / sum(others)``, paired by sample: the share of a score that is left. None where others sum to 0.

    The interval is the delta method's: that of the linearised residuals ``(value - ratio * other) / mean(others)``.
    """
    above, below = np.asarray(values, dtype=float), np.asarray(others, dtype=float)
    if not below.sum():
        return None
    share = float(above.sum() / below.sum())
    spread = mean((above - share * below) / below.mean(), clusters)
    if spread is None or spread.low is None or spread.high is None:
        return Estimate(share)
    return Estimate(share, share + spread.low, share + spread.high)


@dataclass(frozen=True)
class Changes:
    """Samples of two methods that are right for one and wrong for the other.

    lost, gained: right before and wrong now, and the reverse.
    p_value:      McNemar's exact test that neither is the likelier; it takes samples as independent.
    """

    lost: int
    gained: int
    p_value: float


def changes(values: ArrayLike, others: ArrayLike) -> Changes:
    """Count the changes from ``others`` to ``values``; a score of at least 0.5 is right."""
    now, before = np.asarray(values, dtype=float) >= 0.5, np.asarray(others, dtype=float) >= 0.5
    lost, gained = int(np.sum(before & ~now)), int(np.sum(now & ~before))
    test = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return Changes(lost, gained, float(test))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for that many comparisons: at most one in twenty whole tables has a false one below 0.05.

    Holm, Scandinavian Journal of Statistics 6 (1979), 65-70.
    """
    order = np.argsort(p_values)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(len(order), 0, -1))
    return [float(each) for each in np.minimum(corrected, 1)]


def jackknife(
    figures: Callable[[Sequence[int]], Mapping[Name, float]], clusters: Sequence[str]
) -> dict[Name, Estimate]:
    """Figures of all samples together that are no mean over them, such as F1, with their intervals.

    ``figures`` takes the places of samples. Intervals are the delete-a-group jackknife's: images are dealt into twenty
    groups, and the figures computed without each one (Kott, Journal of Official Statistics 17 (2001), 521-526). None
    where nothing varies, as where every answer is right, and where some part has no such figure.
    """
    whole = figures(range(len(clusters)))
    images = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    groups = min(JACKKNIFE_GROUPS, len(images))
    if groups < 2 or not whole:
        return {name: Estimate(value) for name, value in whole.items()}
    group = [images[name] % groups for name in clusters]
    parts = [figures([place for place, one in enumerate(group) if one != left_out]) for left_out in range(groups)]
    estimates = {}
    for name, value in whole.items():
        spread = sum((part.get(name, np.nan) - value) ** 2 for part in parts)
        if not spread > 0:  # zero, or not a number
            estimates[name] = Estimate(value)
            continue
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, groups - 1) * np.sqrt((groups - 1) / groups * spread))
        estimates[name] = Estimate(value, value - half, value + half)
    return estimates


def ratio_of_medians(numerator: ArrayLike, denominator: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """``median(numerator) / median(denominator)`` of pairs, with a percentile interval over resampled pairs."""
    pairs = np.stack([np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)])
    value = np.median(pairs, axis=1)
    ratio = float(value[0] / value[1])
    count = pairs.shape[1]
    if count < 2:
        return Estimate(ratio)
    drawn = np.median(pairs[:, np.random.default_rng(seed).integers(count, size=(resamples, count))], axis=-1)
    low, high = np.quantile(drawn[0] / drawn[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(ratio, float(low), float(high))
