"""Estimates with 95 % intervals that know that questions about one image are not independent.

Everything here is one estimator: the mean over samples, with the cluster-robust variance of a ratio (Liang and Zeger
1986; for evaluations Miller 2024, arXiv 2411.00640, section 2.2) over images and Student's t with images - 1 degrees
of freedom. With one sample an image it is the textbook one-sample t interval; on differences, the paired one. No
resampling, so no seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95


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

    All right or all wrong has no variance to estimate from, yet is no certainty: the exact (Clopper-Pearson) interval
    with every image counted as one observation stands in.
    """
    estimate = mean(values, clusters)
    if estimate is None or estimate.low is None or estimate.high is None:
        return estimate
    if estimate.low == estimate.high and estimate.value in (0, 1):
        images = len(set(clusters))
        exact = stats.binomtest(int(estimate.value) * images, images).proportion_ci(CONFIDENCE)
        return Estimate(estimate.value, float(exact.low), float(exact.high))
    return Estimate(estimate.value, max(0.0, estimate.low), min(1.0, estimate.high))


def difference(values: ArrayLike, others: ArrayLike, clusters: Sequence[str]) -> Estimate | None:
    """The mean of ``values - others``, paired by sample."""
    return mean(np.asarray(values, dtype=float) - np.asarray(others, dtype=float), clusters)


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
