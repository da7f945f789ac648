"""The estimates agree with scipy's where scipy has them, and clustering widens what it should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

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
