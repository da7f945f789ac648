"""VMTC gives what its text says, written out in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from tokenreduce.reducer import Geometry, Selection
from tokenreduce_plugins.vmtc import Vmtc, assigned, k_means, seeds

from .golden import GEOMETRY, random, show, stored


def select(reducer: Vmtc, features: Tensor, attention: Tensor, geometry: Geometry = GEOMETRY) -> Selection:
    """What is selected where the class token pays ``attention`` (tokens,)."""
    step = reducer.steps(geometry)[0]
    view = stored(torch.cat([torch.zeros(1), attention]).expand(1, 1, -1), slice(1, None), class_token=0)
    return show(reducer, step, features, {step.sees[0]: view})


def test_worked_example() -> None:
    attention = torch.tensor([0.30, 0.05, 0.25, 0.10, 0.20, 0.10])
    features = torch.tensor([[1.0, 1], [0, 1], [1, 1], [0, 0.8], [1, 0.2], [0.1, 1]])
    for seed in range(5):
        selection = select(Vmtc(keep=4, clusters=2, layer=-2, iterations=10, seed=seed), features, attention)
        assert selection.index.tolist() == [0, 2, 3, 4]  # of two equally attended members the first one's place
        assert_close(selection.features, torch.tensor([[1, 1], [1, 1], [0.04, 0.92], [1, 0.2]]))
        assert selection.source is not None
        assert selection.source.tolist() == [0, 2, 1, 2, 3, 2]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


def loop(rows: list[list[float]], centres: list[list[float]], iterations: int) -> list[int]:
    """K-means of these rows, one after the other, where no cluster ever loses all its members."""
    clusters = []
    for _ in range(iterations):
        clusters = [max(range(len(centres)), key=lambda centre: cosine(row, centres[centre])) for row in rows]
        centres = []
        for number in range(max(clusters) + 1):
            members = [row for row, cluster in zip(rows, clusters, strict=True) if cluster == number]
            directions = [[value / math.hypot(*row) for value in row] for row in members]
            centres.append([sum(values) for values in zip(*directions, strict=True)])
    return clusters


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_k_means_is_the_plain_loop(iterations: int) -> None:
    features, draws = random(60, 3), torch.rand(5, 60, generator=torch.Generator().manual_seed(4))
    unit = normalize(features, dim=-1)
    centres = [features[place].tolist() for place in seeds(unit, draws).tolist()]
    assert k_means(unit, draws, iterations).tolist() == loop(features.tolist(), centres, iterations)


def test_rows_are_the_means_of_their_clusters_weighted_by_attention() -> None:
    features, attention = random(40, 6), random(40, seed=1).softmax(dim=0)
    selection = select(Vmtc(keep=12, clusters=4, layer=-2, iterations=6), features, attention)
    assert selection.features is not None and selection.source is not None
    assert selection.index.tolist() == sorted(selection.index.tolist())
    primary = sorted(range(40), key=lambda token: -float(attention[token]))[:8]
    for row, token in enumerate(selection.index.tolist()):
        members = (selection.source == row).nonzero()[:, 0].tolist()
        if token in primary:
            assert members == [token] and selection.features[row].equal(features[token])
            continue
        assert token == max(members, key=lambda member: float(attention[member]))
        total = sum(float(attention[member]) for member in members)
        mean = sum(features[member] * float(attention[member]) / total for member in members)
        assert_close(selection.features[row], mean)
    assert (selection.source >= 0).all()


def test_first_centres_are_far_apart_and_never_the_same() -> None:
    unit = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [-1, 0]])
    for seed in range(20):
        draws = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed))
        first, *others = seeds(unit, draws).tolist()
        assert len({first, *others}) == 3
        assert {first, *others} >= {3, 4}  # repetitions have next to no odds while others are left
    odds = torch.zeros(5)
    for seed in range(2000):
        draws = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed))
        draws[0] = torch.tensor([1 - 1e-6, 0.5, 0.5, 0.5, 0.5])  # the first centre is token 0
        odds[seeds(unit, draws)[1]] += 1 / 2000
    assert_close(odds, torch.tensor([0, 0, 0, 1 / 3, 2 / 3]), atol=0.03, rtol=0)


@pytest.mark.parametrize("tokens", [4, 7, 30])
def test_no_cluster_is_empty_among_equal_tokens(tokens: int) -> None:
    draws = torch.rand(4, tokens, generator=torch.Generator().manual_seed(0))
    for unit in (torch.ones(tokens, 1), normalize(random(tokens, 2), dim=-1).round()):
        assert k_means(unit, draws, 5).unique().tolist() == [0, 1, 2, 3]


def test_an_empty_cluster_takes_the_token_that_is_least_like_its_centre() -> None:
    likeness = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1, 0.4, 0.2]])
    assert assigned(likeness).tolist() == [0, 2, 0, 1]  # token 3 is less like its own, but alone there
    assert assigned(torch.tensor([[0.9, 0], [0.1, 0]])).tolist() == [0, 1]


def test_keeping_everything_changes_nothing() -> None:
    features = random(9, 4)
    selection = select(Vmtc(keep=9, clusters=3, layer=-2, iterations=4), features, random(9).softmax(dim=0))
    assert selection.index.tolist() == list(range(9))
    assert_close(selection.features, features)


@pytest.mark.parametrize(
    ("knobs", "message"), [({"iterations": 0}, "at least once"), ({"clusters": "a quarter"}, "is not")]
)
def test_settings_that_cannot_be_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vmtc(**{"clusters": 2, "layer": -2, "iterations": 3, **knobs})
