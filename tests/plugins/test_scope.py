"""SCOPE picks what the official code picks, in its order."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce.signals import EncoderAttention, EncoderHidden
from tokenreduce_plugins.scope import Scope

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored


def kept(attention: Tensor, features: Tensor, keep: int, alpha: float) -> list[int]:
    """The choice, given attention ``(heads, rows, 1 + patches)``, whose first row is the class token's."""
    reducer = Scope(keep, alpha=alpha)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(attention, slice(1, None), class_token=0)
    signals: dict[Hashable, Any] = {EncoderAttention(-2): view, EncoderHidden(-2): features}
    return show(reducer, step, torch.zeros(len(features), 2), signals).index.tolist()


def order(attention: Tensor, features: Tensor, keep: int, alpha: float) -> list[int]:
    """The tokens in the order of picking: what each larger count adds."""
    picks: list[int] = []
    for count in range(1, keep + 1):
        (pick,) = set(kept(attention, features, count, alpha)) - set(picks)
        picks.append(pick)
    return picks


@pytest.mark.parametrize("case", cases("scope"))
def test_official_vectors(case: Case) -> None:
    tiles, alpha = case.settings["B"], case.settings["alpha"]
    keep = int(case.settings["token_num"] / tiles)
    for sample, attention in enumerate(case.given["attn"]):
        features = case.given["hidden"][sample, 1:]
        places = kept(attention, features, keep, alpha)
        assert places == case.expected["kept"][sample].tolist()
        assert_equal_floats(features[places], case.expected["features"][sample])
        assert order(attention, features, keep, alpha) == case.expected["pick_order"][sample].tolist()


@pytest.mark.parametrize("mistake", [0.0, 0.25])
@pytest.mark.parametrize("case", cases("scope")[1:])
def test_another_power_of_attention_keeps_others(case: Case, mistake: float) -> None:
    """Of the first case's three tokens these powers keep the same ones."""
    attention, features = case.given["attn"][0], case.given["hidden"][0, 1:]
    expected = case.expected["kept"][0].tolist()
    assert kept(attention, features, len(expected), mistake * case.settings["alpha"]) != expected


def test_worked_example() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 8, 30, 95, 110, 170, 205, 260, 311]))
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    attention = torch.tensor([[[0.55, 0.01, 0.09, 0.03, 0.02, 0.08, 0.04, 0.07, 0.05, 0.06]]])
    assert order(attention, features, 5, alpha=1.0) == [1, 4, 6, 8, 7]
    assert order(attention, features, 5, alpha=0.0) == [2, 6, 3, 7, 8]
    assert kept(attention, features, 3, alpha=1.0) == [1, 4, 6]


@pytest.mark.parametrize(
    ("attention", "alpha", "expected"),
    [
        ([0.1, 0.1, 0.1, 0.2], 1.0, 0),  # 3 * 0.1 against 1 * 0.2
        ([0.1, 0.1, 0.1, 0.2], 2.0, 3),  # 3 * 0.01 against 1 * 0.04; 2 as a factor, or 3 squared, would take 0
        ([0.05, 0.05, 0.05, 0.2], 1.0, 3),  # 3 * 0.05 against 1 * 0.2
        ([0.05, 0.05, 0.05, 0.2], 0.5, 0),  # 3 * 0.224 against 1 * 0.447; 0.5 as a factor, or the root of 3, takes 3
    ],
)
def test_attention_is_raised_to_the_power_and_multiplied(attention: list[float], alpha: float, expected: int) -> None:
    """Three equal tokens cover one another, the fourth itself alone; a sum would take the first in every case."""
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert kept(torch.tensor([[[0.0, *attention]]]), features, 1, alpha) == [expected]


def test_a_token_that_adds_nothing_waits_however_attended() -> None:
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]])
    assert order(torch.tensor([[[0.0, 0.5, 0.4, 0.01, 0.01]]]), features, 4, alpha=1.0) == [0, 2, 3, 1]


def test_negative_cosines_cover_nothing() -> None:
    """Sums of plain cosines would take the third token, which is unlike none."""
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    assert kept(torch.tensor([[[0.0, 0.3, 0.3, 0.2]]]), features, 1, alpha=1.0) == [0]


@pytest.mark.parametrize("keep", [1, 9, 12])
def test_every_count_is_kept_once(keep: int) -> None:
    attention, features = random(2, 1, 10).softmax(dim=-1), random(9, 8, seed=1)
    places = kept(attention, features, keep, alpha=1.0)
    assert len(set(places)) == min(keep, 9)


def test_without_a_class_token_attention_received_weighs() -> None:
    geometry = replace(GEOMETRY, class_token=False)
    reducer, attention = Scope(3), random(4, 9, 9).softmax(dim=-1)
    (step,) = reducer.steps(geometry)
    signals: dict[Hashable, Any] = {
        EncoderAttention(-2): stored(attention, slice(0, None)),
        EncoderHidden(-2): torch.eye(9),
    }
    selection = show(reducer, step, torch.zeros(9, 2), signals, geometry=geometry)
    assert selection.index.tolist() == sorted(attention.mean(dim=(0, 1)).topk(3).indices.tolist())
