"""HiPrune keeps what the official code for LLaVA and that for Qwen2.5-VL keep."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce import create
from tokenreduce.reducer import Grid, Span, Tile
from tokenreduce.signals import EncoderAttention
from tokenreduce.testing import visual_tokens
from tokenreduce_plugins.hiprune import HiPrune

from .golden import GEOMETRY, Case, cases, random, stored

SQUARE = Grid(24, 24)


def kept(reducer: HiPrune, middle: Tensor, deep: Tensor, grid: Grid = SQUARE, class_token: bool = True) -> list[int]:
    """The choice, given both layers' attention ``(heads, rows, sequence)``; the class token's column is the first."""
    geometry = replace(GEOMETRY, class_token=class_token)
    (step,) = reducer.steps(geometry)
    visual, place = slice(int(class_token), None), 0 if class_token else None
    signals: dict[Hashable, Any] = {
        seen: stored(attention, visual, class_token=place)
        for seen, attention in zip(step.sees, (middle, deep), strict=True)
    }
    tokens = len(grid)
    count = reducer.count(step, Span(geometry, (Tile(grid),), tokens, tokens))
    shown = visual_tokens(torch.zeros(tokens, 2), count, grid=grid, signals=signals, geometry=geometry)
    index = reducer.select(step, shown).index
    least, most = shown.bounds or (0, tokens)
    assert least <= len(index) <= most
    return index.tolist()


def of_case(case: Case, **mistake: Any) -> list[list[int]]:
    settings = {"keep": int(case.settings["retention"] / case.settings["B"]), "alpha": case.settings["alpha"]}
    settings["middle_layer"] = case.settings["object_layer"] - 1
    reducer = HiPrune(**{**settings, **mistake})
    return [kept(reducer, *layers) for layers in zip(case.given["attn_object"], case.given["attn_deep"], strict=True)]


@pytest.mark.parametrize("case", cases("hiprune"))
def test_official_vectors(case: Case) -> None:
    assert of_case(case) == case.expected["kept"].tolist()


@pytest.mark.parametrize("case", cases("hiprune"))
def test_another_share_or_the_class_tokens_row_keeps_others(case: Case) -> None:
    expected = case.expected["kept"].tolist()
    assert of_case(case, alpha=0.0) != expected
    assert of_case(case, alpha=case.settings["alpha"] + 0.1) != expected
    first_rows = {name: attention[:, :, :1] for name, attention in case.given.items()}
    assert of_case(replace(case, given=first_rows)) != expected


def qwen(case: Case, **settings: Any) -> list[int]:
    """With the vector that tokens receive, which averages 1, as the only query's attention."""
    grid = Grid(case.settings["rows"], case.settings["cols"])
    given = {"keep": case.settings["retention"], "alpha": case.settings["alpha"], "deep_layer": -1, "attention": "sum"}
    middle, deep = (case.given[name][None, None] for name in ("attn_object", "attn_deep"))
    return kept(HiPrune(**{**given, **settings}), middle, deep, grid, class_token=False)


@pytest.mark.parametrize("case", cases("hiprune_qwen"))
def test_official_vectors_of_the_code_for_qwen(case: Case) -> None:
    expected = case.expected["kept"].tolist()
    assert qwen(case) == expected
    positions = case.expected["kept_positions"]
    picture = len(case.given["attn_deep"])
    behind = positions[(positions >= case.settings["prefix"]) & (positions < case.settings["prefix"] + picture)]
    assert (behind - case.settings["prefix"]).tolist() == expected


def test_means_keep_the_exact_count_where_sums_keep_fewer() -> None:
    counts = []
    for parameters in cases("hiprune_qwen"):
        (case,) = parameters.values
        assert isinstance(case, Case)
        rows = len(case.given["attn_deep"])
        exact = {name: vector / rows for name, vector in case.given.items()}
        keep = round(rows * case.settings["retention"])
        assert len(qwen(replace(case, given=exact), attention="mean")) == keep
        counts.append(keep - len(qwen(case)))
    assert counts == [0, 1, 1, 0]


def ranked(order: list[int], tokens: int = 576) -> Tensor:
    """Attention ``(1, 1, 1 + tokens)`` that falls along ``order``; all other tokens receive less."""
    row = torch.zeros(1 + tokens)
    row[1:][order] = torch.linspace(0.1, 0.05, len(order))
    return row[None, None]


def test_worked_examples() -> None:
    deep = ranked(list(range(0, 576, 50)))
    assert kept(HiPrune(10, alpha=0.5), ranked([300]), deep) == [0, 50, 100, 150, 200, 276, 299, 300, 301, 324]


def test_neighbours_wrap_at_the_sides_and_are_clamped_above_and_below() -> None:
    """Of 5, in the top row, and 24, at the left edge, nine tokens are left, and eleven more fill up."""
    places = kept(HiPrune(20, alpha=0.5), ranked([5, 24]), ranked(list(range(100, 120))))
    assert places == [0, 4, 5, 6, 23, 24, 25, 29, 48, *range(100, 111)]
    assert kept(HiPrune(5, alpha=1.0), ranked([570]), ranked([100])) == [100, 546, 569, 570, 571, 575][1:]


@pytest.mark.parametrize(("keep", "alpha", "anchors"), [(25, 0.1, 0), (26, 0.1, 1), (75, 0.1, 2), (125, 0.1, 2)])
def test_the_number_of_anchors_is_rounded_half_to_even(keep: int, alpha: float, anchors: int) -> None:
    """0.5, 0.52, 1.5 and 2.5 of them: far apart, each brings all its neighbours."""
    places = kept(HiPrune(keep, alpha=alpha), ranked([30, 100, 170]), ranked(list(range(300, 576))))
    assert [place in places for place in (30, 31, 100, 124, 170)] == [anchors > 0] * 2 + [anchors > 1] * 2 + [
        anchors > 2
    ]
    assert len(places) == keep


def test_tokens_that_are_kept_already_are_not_counted_again() -> None:
    assert kept(HiPrune(10, alpha=0.5), ranked([300]), ranked([300, 301, 7, 8, 9, 10, 11, 12])) == [
        7, 8, 9, 10, 11, 276, 299, 300, 301, 324,
    ]  # fmt: skip


@pytest.mark.parametrize("attention", ["mean", "sum"])
def test_where_neighbours_are_too_many_the_official_code_stops_and_anchors_stay(attention: Any) -> None:
    middle = ranked([300, 299, 276])
    assert kept(HiPrune(4, alpha=0.9, attention=attention), middle, ranked([7]))[:1] != [7]
    assert {276, 299, 300} < set(kept(HiPrune(4, alpha=0.9, attention=attention), middle, ranked([7])))


def test_all_and_one_can_be_kept() -> None:
    attention = random(2, 3, 577).softmax(dim=-1)
    assert kept(HiPrune(1.0), attention, attention) == list(range(576))
    assert kept(HiPrune(1), attention, attention) == [int(attention.mean(dim=(0, 1))[1:].argmax())]


def test_presets_see_the_published_layers() -> None:
    (step,) = HiPrune().steps(GEOMETRY)
    assert [GEOMETRY.encoder_layer(seen.layer) for seen in step.sees if isinstance(seen, EncoderAttention)] == [8, 22]
    geometry = replace(GEOMETRY, encoder_layers=32)
    (step,) = create("hiprune_qwen_112").steps(geometry)
    assert [geometry.encoder_layer(seen.layer) for seen in step.sees if isinstance(seen, EncoderAttention)] == [15, 31]


def test_a_share_beyond_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha=1.5 is no share: it must be from 0 to 1"):
        HiPrune(alpha=1.5)
