"""A comparison that is held to a budget is the one that the setting by hand gives, and says what was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenreduce import create
from tokenreduce.budget import Budget
from tokenreduce.evaluation import Settings, compare, read_metrics
from tokenreduce.evaluation.comparison import Comparer


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, batch_size=4, max_new_tokens=1, random_seeds=1, timing_pairs=0)


def test_a_budget_and_the_setting_that_meets_it_are_one_run(
    model: Any, processor: Any, cards: Any, settings: Settings
) -> None:
    by_hand, _ = compare(model, processor, cards(count=6), create("uniform", keep=9), settings)
    folder, metrics = compare(model, processor, cards(count=6), create("uniform"), settings, budget=Budget("tokens", 9))
    assert folder == by_hand
    row = metrics["methods"]["reducer"]
    assert row["knobs"]["keep"] == row["visual_tokens"]["kept"] == 9
    assert metrics["budget"] == {
        "currency": "tokens", "value": 9, "asked": 9.0, "expected": 9.0, "least": 1.0, "most": 36.0, "whole": 36.0
    }  # fmt: skip
    assert metrics == read_metrics(folder)


@pytest.mark.parametrize(("currency", "field"), [("layer_mean", "visual_tokens"), ("flops", "prefill_flops")])
def test_what_was_expected_is_what_was_spent(
    model: Any, processor: Any, cards: Any, settings: Settings, currency: Any, field: str
) -> None:
    _, metrics = compare(model, processor, cards(count=15), create("vtw"), settings, budget=Budget(currency, 0.6))
    spent = metrics["methods"]["reducer"][field]["layer_mean" if currency == "layer_mean" else "llm"]
    # Solved on the first pictures: other questions have other lengths, which only FLOPs feel.
    assert spent == pytest.approx(metrics["budget"]["expected"], rel=0.05 if currency == "flops" else 1e-9)


def test_it_is_finished_only_with_the_same_budget(model: Any, processor: Any, cards: Any, settings: Settings) -> None:
    comparer = Comparer(model, processor, cards(count=6), settings)
    reducer, budget = create("uniform"), Budget("tokens", 0.25)
    assert comparer.finished(reducer, budget) is None
    comparer.compare(reducer, budget=budget)
    finished = comparer.finished(reducer, budget)
    assert finished is not None and finished[1]["budget"]["value"] == 0.25
    assert comparer.finished(reducer, Budget("layer_mean", 0.25)) is None, "the same run, but another question"


def test_a_budget_needs_a_picture_that_can_be_read(model: Any, processor: Any, cards: Any, settings: Settings) -> None:
    with pytest.raises(ValueError, match="none of the 6 samples can be read, so no budget can be solved"):
        compare(
            model, processor, cards(count=6, broken=(0, 1)), create("uniform"), settings, budget=Budget("tokens", 9)
        )
