"""VisPruner keeps what the official code keeps, and what its rule in plain lists keeps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce.signals import EncoderAttention, EncoderHidden
from tokenreduce_plugins.vispruner import VisPruner, thinned

from .golden import GEOMETRY, Case, cases, random, show, stored


def kept(attention: Tensor, features: Tensor, keep: int, important_ratio: float) -> list[int]:
    """The choice, given attention ``(heads, rows, 1 + patches)``, whose first row is the class token's."""
    reducer = VisPruner(keep, important_ratio=important_ratio)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(attention, slice(1, None), class_token=0)
    signals: dict[Hashable, Any] = {EncoderAttention(-2): view, EncoderHidden(-2): features}
    return show(reducer, step, torch.zeros(len(features), 2), signals).index.tolist()


def plain(
    ranked: list[int], features: Tensor, count: int, *, in_raster: bool = False, sorted_in: bool = True
) -> set[int]:
    """The rule on lists; ``in_raster`` and not ``sorted_in`` are mistakes in the order of the working list."""
    unit = features / features.norm(dim=-1, keepdim=True)
    likeness = (unit @ unit.T).tolist()
    left = sorted(ranked) if in_raster else ranked
    while len(left) > count:
        compared, between = left[::2], left[1::2]
        nearest = {place: max(likeness[place][other] for other in between) for place in compared}
        by_likeness = sorted(compared, key=lambda place: -nearest[place])
        stay = by_likeness[min(8, len(left) - count, len(between)) :]
        left = (stay if sorted_in else [place for place in compared if place in stay]) + between
    return set(left)


@pytest.mark.parametrize("case", cases("vispruner"))
def test_official_vectors(case: Case) -> None:
    keep, ratio = case.settings["T"], case.settings["important_ratio"]
    for sample, (attention, hidden) in enumerate(zip(case.given["attn"], case.given["hidden"], strict=True)):
        assert kept(attention, hidden[1:], keep, ratio) == case.expected["kept"][sample].tolist()
        ranked = attention[:, 0, 1:].mean(dim=0).argsort(descending=True)
        important, diverse = case.expected["important"][sample], case.expected["diverse_in_internal_order"][sample]
        assert ranked[: len(important)].equal(important)
        assert thinned(hidden[1:], ranked[len(important) :], len(diverse)).equal(diverse)


@pytest.mark.parametrize("mistake", [{"in_raster": True}, {"sorted_in": False}], ids=str)
@pytest.mark.parametrize("case", cases("vispruner"))
def test_another_order_of_the_working_list_keeps_others(case: Case, mistake: dict[str, bool]) -> None:
    attention, features = case.given["attn"][0], case.given["hidden"][0, 1:]
    important, diverse = case.expected["important"][0], case.expected["diverse_in_internal_order"][0]
    rest = attention[:, 0, 1:].mean(dim=0).argsort(descending=True).tolist()[len(important) :]
    assert plain(rest, features, len(diverse)) == set(diverse.tolist())
    assert plain(rest, features, len(diverse), **mistake) != set(diverse.tolist())


ANGLES = torch.deg2rad(torch.tensor([0.0, 8, 30, 95, 110, 170, 205, 260, 311, 20, 60, 75, 130, 150, 230, 285]))
RANKS = torch.tensor([0.0, 1, 9, 3, 2, 8, 4, 7, 5, 6, 16, 10, 15, 11, 14, 12, 13])


def worked(keep: int, important_ratio: float) -> list[int]:
    """Sixteen tokens on a circle; attention is proportional to ``RANKS``."""
    features = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
    return kept((RANKS / RANKS.sum())[None, None], features, keep, important_ratio)


def test_worked_examples() -> None:
    assert worked(10, 0.4) == [0, 1, 2, 6, 7, 9, 11, 12, 13, 15]
    assert worked(12, 0.5) == [0, 1, 2, 4, 6, 7, 9, 11, 12, 13, 14, 15]
    assert worked(9, 0.5) == [0, 1, 6, 7, 9, 11, 12, 13, 15]


def test_the_share_of_attention_is_rounded_down() -> None:
    """4.6 important tokens are 4, and not 5 by any rounding to the nearest."""
    assert worked(10, 0.46) == worked(10, 0.4) != worked(10, 0.5)


def test_all_by_attention_and_none() -> None:
    assert worked(4, 1.0) == [9, 11, 13, 15]
    assert worked(16, 0.5) == worked(16, 1.0) == list(range(16))
    features = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
    ranked = RANKS[1:].argsort(descending=True).tolist()
    assert worked(8, 0.0) == sorted(plain(ranked, features, 8))


@pytest.mark.parametrize(
    ("tokens", "keep", "ratio"), [(16, 8, 0.5), (16, 6, 0.5), (17, 8, 0.5), (577, 65, 0.5), (5, 2, 0.5), (1, 1, 0.5)]
)
def test_where_the_official_code_stops_this_goes_on(tokens: int, keep: int, ratio: float) -> None:
    """With an odd number in the working list, or with fewer pairs than have to go."""
    attention, features = random(2, 1, 1 + tokens).softmax(dim=-1), random(tokens, 8, seed=1)
    important = int(keep * ratio)
    ranked = attention[:, 0, 1:].mean(dim=0).argsort(descending=True).tolist()
    expected = set(ranked[:important]) | plain(ranked[important:], features, keep - important)
    assert kept(attention, features, keep, ratio) == sorted(expected)
    assert len(expected) == keep


def test_without_a_class_token_attention_received_decides() -> None:
    geometry = replace(GEOMETRY, class_token=False)
    reducer, attention = VisPruner(3, important_ratio=1.0), random(4, 9, 9).softmax(dim=-1)
    (step,) = reducer.steps(geometry)
    signals: dict[Hashable, Any] = {
        EncoderAttention(-2): stored(attention, slice(0, None)),
        EncoderHidden(-2): random(9, 2),
    }
    selection = show(reducer, step, torch.zeros(9, 2), signals, geometry=geometry)
    assert selection.index.tolist() == sorted(attention.mean(dim=(0, 1)).topk(3).indices.tolist())


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_share_beyond_all_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"important_ratio={ratio} is no share: it must be from 0 to 1"):
        VisPruner(important_ratio=ratio)
