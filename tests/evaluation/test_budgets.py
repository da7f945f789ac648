"""A comparison that is held to a budget is the one that the setting by hand gives, and says what was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenreduce import create
from tokenreduce.budget import Budget
from tokenreduce.evaluation import Comparer, Settings, TransformersBackend, compare, read_result
from tokenreduce.evaluation.result import BudgetResult

SETTINGS = Settings(batch_size=4, max_new_tokens=1, random_seeds=1, timing_pairs=0)


def test_a_budget_and_the_setting_that_meets_it_are_one_run(
    model: Any, processor: Any, cards: Any, tmp_path: Path
) -> None:
    by_hand, _ = compare(model, processor, cards(count=6), create("uniform", keep=9), tmp_path, SETTINGS)
    folder, result = compare(
        model, processor, cards(count=6), create("uniform"), tmp_path, SETTINGS, budget=Budget("tokens", 9)
    )
    assert folder == by_hand
    assert result.main.knobs["keep"] == result.main.visual_tokens.kept == 9
    assert result.budget == BudgetResult("tokens", 9, asked=9.0, expected=9.0, least=1.0, most=36.0, whole=36.0)
    assert result == read_result(folder)


@pytest.mark.parametrize("currency", ["layer_mean", "flops"])
def test_what_was_expected_is_what_was_spent(
    model: Any, processor: Any, cards: Any, tmp_path: Path, currency: Any
) -> None:
    benchmark, budget = cards(count=15), Budget(currency, 0.6)
    _, result = compare(model, processor, benchmark, create("vtw"), tmp_path, SETTINGS, budget=budget)
    main = result.main
    spent = main.visual_tokens.layer_mean if currency == "layer_mean" else main.prefill_flops.llm
    # Solved on the first pictures: other questions have other lengths, which only FLOPs feel.
    assert result.budget is not None
    assert spent == pytest.approx(result.budget.expected, rel=0.05 if currency == "flops" else 1e-9)


def test_it_is_finished_only_with_the_same_budget(model: Any, processor: Any, cards: Any, tmp_path: Path) -> None:
    comparer = Comparer(TransformersBackend(model, processor), cards(count=6), tmp_path, SETTINGS)
    reducer, budget = create("uniform"), Budget("tokens", 0.25)
    assert comparer.finished(reducer, budget) is None
    comparer.compare(reducer, budget=budget)
    finished = comparer.finished(reducer, budget)
    assert finished is not None and finished[1].budget is not None and finished[1].budget.value == 0.25
    assert comparer.finished(reducer, Budget("layer_mean", 0.25)) is None, "the same run, but another question"


def test_a_budget_needs_a_picture_that_can_be_read(model: Any, processor: Any, cards: Any, tmp_path: Path) -> None:
    broken, budget = cards(count=6, broken=(0, 1)), Budget("tokens", 9)
    with pytest.raises(ValueError, match="none of the 6 samples can be read, so no budget can be solved"):
        compare(model, processor, broken, create("uniform"), tmp_path, SETTINGS, budget=budget)
