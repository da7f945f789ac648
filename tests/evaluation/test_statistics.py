"""The estimates agree with scipy's where scipy has them, and clustering widens what it should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tokenreduce.evaluation import statistics


def test_one_sample_an_image_is_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(0.3, 0.2, 40)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    estimate = statistics.mean(values, [str(number) for number in range(40)])
    assert estimate is not None
    assert [estimate.value, estimate.low, estimate.high] == pytest.approx([values.mean(), expected.low, expected.high])


def test_equal_clusters_are_the_t_interval_of_their_means() -> None:
    values = np.random.default_rng(1).normal(size=(30, 5))
    expected = stats.ttest_1samp(values.mean(1), 0).confidence_interval(0.95)
    estimate = statistics.mean(values.ravel(), [f"image{row}" for row in range(30) for _ in range(5)])
    assert estimate is not None
    assert [estimate.low, estimate.high] == pytest.approx([expected.low, expected.high])


def test_a_difference_is_scipys_paired_test() -> None:
    generator = np.random.default_rng(2)
    one, other = generator.random(50), generator.random(50)
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    estimate = statistics.difference(one, other, [str(number) for number in range(50)])
    assert estimate is not None
    assert [estimate.low, estimate.high] == pytest.approx([expected.low, expected.high])


def test_a_differences_p_value_is_scipys_and_belongs_to_its_interval() -> None:
    generator = np.random.default_rng(5)
    one, other = generator.random(40), generator.random(40)
    images = [str(number) for number in range(40)]
    assert statistics.difference_p_value(one, other, images) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    clusters, one, other = [str(number // 4) for number in range(40)], one.round(), other.round()
    for shift in np.linspace(-0.5, 0.5, 21):
        estimate = statistics.difference(one + shift, other, clusters)
        p_value = statistics.difference_p_value(one + shift, other, clusters)
        assert estimate is not None and estimate.low is not None and estimate.high is not None and p_value is not None
        assert (p_value < 0.05) == (not estimate.low <= 0 <= estimate.high)
    assert statistics.difference_p_value(one, one, clusters) == 1
    assert statistics.difference_p_value(one, other, ["one"] * 40) is None


def test_a_clustered_interval_is_that_of_a_bootstrap_over_images() -> None:
    generator = np.random.default_rng(6)
    sizes = generator.integers(1, 8, 150)
    images = np.repeat(np.arange(150), sizes)
    scores = (generator.random(len(images)) < generator.random(150)[images]).astype(float)
    others = np.where(generator.random(len(images)) < 0.2, 1 - scores, scores)
    change = np.bincount(images, scores - others)

    def pooled(change: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(change.sum(axis) / sizes.sum(axis))

    drawn = stats.bootstrap(
        (change, sizes), pooled, paired=True, vectorized=True, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    estimate = statistics.difference(scores, others, [str(image) for image in images])
    assert estimate is not None and estimate.low is not None and estimate.high is not None
    width = estimate.high - estimate.low
    assert [estimate.low, estimate.high] == pytest.approx([drawn.low, drawn.high], abs=0.06 * width)


def test_a_ratio_is_that_of_a_bootstrap_over_images() -> None:
    generator = np.random.default_rng(7)
    before = (generator.random((200, 3)) < 0.8).astype(float)
    now = before * (generator.random((200, 3)) < 0.7)
    drawn = stats.bootstrap(
        (now.sum(1), before.sum(1)),
        lambda now, before, axis: now.sum(axis) / before.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=0,
    ).confidence_interval
    estimate = statistics.ratio(now.ravel(), before.ravel(), [str(image) for image in range(200) for _ in range(3)])
    assert estimate is not None and estimate.low is not None and estimate.high is not None
    assert estimate.value == now.sum() / before.sum()
    assert [estimate.low, estimate.high] == pytest.approx([drawn.low, drawn.high], abs=0.005)
    assert statistics.ratio([0.0, 0.0], [0.0, 0.0], ["one", "other"]) is None


def test_changes_are_statsmodels_mcnemar() -> None:
    generator = np.random.default_rng(8)
    for size in (5, 40, 400):
        now, before = generator.random(size) < 0.6, generator.random(size) < 0.7
        table = [[np.sum(now & before), np.sum(now & ~before)], [np.sum(~now & before), np.sum(~now & ~before)]]
        found = statistics.changes(now, before)
        assert (found.lost, found.gained) == (table[1][0], table[0][1])
        assert found.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert statistics.changes([1.0, 0.2], [0.9, 0.4]) == statistics.Changes(0, 0, 1.0)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_holm_is_statsmodels(count: int) -> None:
    p_values = np.random.default_rng(count).random(count) ** 3
    assert statistics.holm(p_values.tolist()) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert statistics.holm([]) == []


def test_the_interval_covers_the_truth_at_its_rate_when_questions_share_images() -> None:
    generator, covered, naive = np.random.default_rng(3), 0, 0
    sizes = generator.integers(1, 9, 60)
    images = np.repeat(np.arange(60), sizes)
    for _ in range(400):
        difficulty = generator.normal(0, 1, 60)
        values = difficulty[images] + generator.normal(0, 0.5, len(images))
        estimate = statistics.mean(values, [str(image) for image in images])
        assert estimate is not None and estimate.low is not None and estimate.high is not None
        covered += estimate.low <= 0 <= estimate.high
        alone = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        naive += alone.low <= 0 <= alone.high
    assert 0.91 <= covered / 400 <= 0.98
    assert naive / 400 < 0.85, "samples taken as independent would be too sure, so this test can tell"


def test_scores_stay_between_nothing_and_everything() -> None:
    images = [str(number) for number in range(20)]
    estimate = statistics.score([1.0] * 19 + [0.0], images)
    assert estimate is not None and estimate.high == 1.0 and estimate.low is not None and estimate.low > 0.8


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_all_alike_is_not_certain(right: float) -> None:
    estimate = statistics.score([right] * 30, [f"image{number // 3}" for number in range(30)])
    exact = stats.binomtest(10 * int(right), 10).proportion_ci(0.95)
    assert estimate == statistics.Estimate(right, exact.low, exact.high)
    half = statistics.score([1.0, 0.0] * 10, [f"image{number // 2}" for number in range(20)])
    between = stats.binomtest(5, 10).proportion_ci(0.95)
    assert half == statistics.Estimate(0.5, between.low, between.high)


def test_too_little_has_no_interval() -> None:
    assert statistics.mean([], []) is None
    assert statistics.mean([1.0, 0.0], ["one", "one"]) == statistics.Estimate(0.5)


def test_values_and_images_must_correspond() -> None:
    with pytest.raises(ValueError, match="3 values for 2 samples"):
        statistics.mean([1, 2, 3], ["one", "other"])


def test_a_ratio_of_medians_covers_the_truth_and_ignores_what_hits_both() -> None:
    generator = np.random.default_rng(4)
    slow_moments = generator.lognormal(0, 1, 60)
    estimate = statistics.ratio_of_medians(0.5 * slow_moments, slow_moments)
    assert estimate.value == pytest.approx(0.5)
    assert estimate.low == pytest.approx(0.5) and estimate.high == pytest.approx(0.5)
    noisy = statistics.ratio_of_medians(generator.normal(0.7, 0.1, 60), generator.normal(1, 0.1, 60))
    assert noisy.low is not None and noisy.high is not None
    assert noisy.low < 0.7 < noisy.high and noisy.high - noisy.low < 0.2
