"""DART gives what the official code gave."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce.reducer import Grid, Span, Tile
from tokenreduce.signals import DecoderHidden
from tokenreduce_plugins.dart import Dart

from .decoder import UNREDUCED, assert_official, last_logit_change, run
from .golden import GEOMETRY, Case, cases, random, show, stored


def kept(reducer: Dart, hidden: Tensor, keys: Tensor, prefix: int, count: int) -> Tensor:
    """What stays of ``count`` visual tokens by a sequence's features ``(sequence, dim)`` and keys ``(heads, sequence,
    head_dim)``."""
    (step,) = reducer.steps(GEOMETRY)
    text = torch.arange(prefix + count, len(hidden))
    view = stored(torch.empty(0), slice(prefix, prefix + count), keys=keys, text=text)
    signals: dict[Hashable, Any] = {step.sees[0]: view, DecoderHidden(normed=True): hidden}
    return show(reducer, step, hidden[prefix : prefix + count], signals).index


def reducer_of(case: Case, **others: Any) -> Dart:
    knobs = {"keep": case.settings["budget"], "layer": case.settings.get("K", 2)}
    pivots = {name: case.settings[name] for name in ("image_pivots", "text_pivots")}
    return Dart(**{**knobs, **pivots, **others})


@pytest.mark.parametrize("case", cases("dart"))
def test_official_selection(case: Case) -> None:
    shown = case.given["hidden"], case.given["keys"], case.settings["prefix"], case.settings["N"]
    assert kept(reducer_of(case), *shown).equal(case.expected["kept_image"])


def test_the_order_of_the_pivots_matters() -> None:
    """At least one vector notices when pivots are visited in ascending order."""
    found = [parameter.values[0] for parameter in cases("dart")]
    changed = [
        case.about["name"]
        for case in found
        if not kept(
            reducer_of(case, order="ascending"),
            case.given["hidden"],
            case.given["keys"],
            case.settings["prefix"],
            case.settings["N"],
        ).equal(case.expected["kept_image"])
    ]
    assert changed


@pytest.mark.parametrize("case", cases("e2e_dart"))
def test_official_model(case: Case) -> None:
    found = run(case, reducer_of(case))
    assert found.index[0].equal(case.expected["kept_image"])
    assert_official(case, found)


@pytest.mark.parametrize("case", cases("e2e_dart"))
def test_mistakes_are_noticed(case: Case) -> None:
    compacted = run(case, reducer_of(case, positions="compact"))
    assert compacted.index[0].equal(case.expected["kept_image"])
    sensitivity = case.about["sensitivity"]
    expected = sensitivity["last_token_logit_change_if_positions_were_compacted"]
    assert last_logit_change(case, compacted) == pytest.approx(expected, abs=1e-4)
    assert expected > 1
    expected = sensitivity["last_token_logit_change_without_reduction"]
    assert last_logit_change(case, run(case, UNREDUCED)) == pytest.approx(expected, abs=1e-4)
    later = run(case, reducer_of(case, layer=case.settings["K"] + 1))
    assert not later.index[0].equal(case.expected["kept_image"])


def test_worked_example() -> None:
    """Prefix 2, nine visual tokens, three of text; one pivot of each and two tokens a pivot."""
    sizes = torch.tensor([0.0, 0, 1, 2, 9, 3, 1, 2, 1, 2, 1, 5, 1, 1])
    angles = torch.deg2rad(torch.tensor([0.0, 0, 0, 8, 30, 95, 110, 170, 205, 260, 311, 120, 0, 0]))
    hidden = torch.stack([angles.cos(), angles.sin()], dim=1)
    keys = torch.stack([sizes, -sizes], dim=1)[None]
    reducer = Dart(keep=4, image_pivots=1, text_pivots=1)
    assert kept(reducer, hidden, keys, 2, 9).tolist() == [2, 5, 6, 7, 8]


@pytest.mark.parametrize(("budget", "count"), [(192, 196), (128, 132), (64, 68), (128 / 576, 132), (1.0, 576)])
def test_published_budgets_keep_the_image_pivots_on_top(budget: float, count: int) -> None:
    reducer = Dart(keep=budget)
    (step,) = reducer.steps(GEOMETRY)
    assert reducer.count(step, Span(GEOMETRY, (Tile(Grid(24, 24)),), 576, 576)) == count


@pytest.mark.parametrize("text", [0, 1, 3, 9])
@pytest.mark.parametrize("keep", [0.01, 0.3, 1.0])
def test_a_short_text_changes_no_count(text: int, keep: float) -> None:
    hidden, keys = random(5 + 36 + text, 8), random(2, 5 + 36 + text, 4, seed=1)
    index = kept(Dart(keep=keep), hidden, keys, 5, 36)
    assert len(index) == min(36, 4 + int(36 * keep) // 8 * 8)


def test_no_image_pivot_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image pivot"):
        Dart(image_pivots=0)
