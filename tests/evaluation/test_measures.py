"""Figures that a benchmark computes of all answers together: in the metrics of every method, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenreduce import create
from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.evaluation import Settings, compare, read_records, statistics
from tokenreduce.reporting.table import measures


def test_of_a_mean_the_jackknife_is_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(size=statistics.JACKKNIFE_GROUPS)
    images = [str(number) for number in range(len(values))]
    jackknife = statistics.jackknife(lambda places: {"mean": float(values[list(places)].mean())}, images)["mean"]
    textbook = statistics.mean(values, images)
    assert textbook is not None
    assert (jackknife.value, jackknife.low, jackknife.high) == pytest.approx(
        (textbook.value, textbook.low, textbook.high)
    )


def test_the_jackknife_leaves_out_whole_images() -> None:
    """Two questions about each of many images, the second a copy of the first: an interval as if it were not there."""
    values = np.random.default_rng(1).normal(size=400)
    images = [str(number) for number in range(len(values))]

    def interval(values: Sequence[float], images: Sequence[str]) -> tuple[float | None, float | None]:
        found = statistics.jackknife(lambda places: {0: float(np.mean([values[place] for place in places]))}, images)
        return found[0].low, found[0].high

    assert interval([*values, *values], images * 2) == pytest.approx(interval(list(values), images))


def test_there_is_no_interval_where_there_is_nothing_to_estimate_it_from() -> None:
    assert statistics.jackknife(lambda places: {"all right": 100.0}, ["a", "b"]) == {
        "all right": statistics.Estimate(100)
    }
    assert statistics.jackknife(lambda places: {"n": len(places)}, ["a", "a"]) == {"n": statistics.Estimate(2)}
    lacking = statistics.jackknife(lambda places: {"first": 1.0} if 0 in places else {}, ["a", "b"])
    assert lacking == {"first": statistics.Estimate(1)}
    assert statistics.jackknife(lambda places: {}, ["a", "b"]) == {}


def longest(self: Any, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """How long the longest answer is, which is no mean."""
    assert len(answers) == len(samples)
    return {"longest": float(max(len(answer) for answer in answers))}


def test_every_method_has_the_benchmarks_own_figures(
    model: Any, processor: Any, cards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "measures", longest)
    settings = Settings(batch_size=4, max_new_tokens=3, random_seeds=2, timing_pairs=0)
    benchmark = cards(count=12, broken=(1,))
    _, result = compare(model, processor, benchmark, create("pool", keep=4), tmp_path, settings)
    expected = {
        key: [max(len(record.answer or "") for record in read_records(tmp_path / folder)) for folder in method.runs]
        for key, method in result.methods.items()
    }
    for key, method in result.methods.items():
        figure, difference = method.measures["longest"], method.measures["longest"].difference_to_unreduced
        assert figure.value == sum(expected[key]) / len(expected[key])
        if figure.low is not None and figure.high is not None:
            assert figure.low <= figure.value <= figure.high
        assert (difference is None) == (key == "unreduced")
        assert difference is None or difference.value == figure.value - expected["unreduced"][0]
    (table,) = measures(result)
    assert [column.header for column in table.columns][1:] == ["longest"]
    assert table.row_count == 3


def test_a_benchmark_without_figures_has_no_table(model: Any, processor: Any, cards: Any, tmp_path: Path) -> None:
    settings = Settings(batch_size=4, max_new_tokens=1, random_seeds=0, timing_pairs=0)
    _, result = compare(model, processor, cards(count=4), create("none"), tmp_path, settings)
    assert result.unreduced.measures == {}
    assert measures(result) == []
