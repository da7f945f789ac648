"""DivPrune picks what the official code picks, and what the plain recurrence over all distances picks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenreduce_plugins.divprune import DivPrune, diverse

from .golden import GEOMETRY, Case, cases, random, show


def plain(features: Tensor, count: int) -> list[int]:
    """The recurrence, over the matrix of all distances."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distances = 1 - unit @ unit.T
    picked = [int(distances.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picked) < count:
        picked.append(int(distances[picked].min(dim=0).values.argmax()))
    return picked


def kept(features: Tensor, keep: int | float) -> list[int]:
    reducer = DivPrune(keep)
    (step,) = reducer.steps(GEOMETRY)
    return show(reducer, step, features).index.tolist()


def clustered(tokens: int, dim: int, clusters: int) -> Tensor:
    which = torch.randint(clusters, (tokens,), generator=torch.Generator().manual_seed(3))
    return random(clusters, dim, seed=1)[which] + 0.3 * random(tokens, dim, seed=2)


def smooth(side: int, dim: int) -> Tensor:
    """Neighbours on the grid resemble each other."""
    coarse = random(1, dim, side // 3, side // 3, seed=4)
    fine = interpolate(coarse, size=(side, side), mode="bilinear")[0].flatten(1).T
    return fine + 0.2 * random(side * side, dim, seed=5) + random(dim, seed=6)


@pytest.mark.parametrize("case", cases("divprune"))
def test_official_vectors(case: Case) -> None:
    features, count = case.given["x"], len(case.expected["kept"])
    assert diverse(features, count).equal(case.expected["pick_order"])
    assert kept(features, case.settings["ratio"]) == case.expected["kept"].tolist()


def test_worked_example() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 8, 30, 95, 110, 170, 205, 260, 311], dtype=torch.double))
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert diverse(features, 5).tolist() == [7, 3, 0, 5, 8]
    assert kept(features, 1 / 3) == [0, 3, 7]
    assert kept(features, 4 / 9) == kept(features, 0.5) == [0, 3, 5, 7]
    assert kept(features, 0.55) == [0, 3, 5, 7, 8]


@pytest.mark.parametrize(
    ("features", "count"),
    [
        (random(576, 64), 64),
        (random(700, 512).double(), 700),  # so many picks come to ties in single precision
        (clustered(600, 128, 40), 100),
        (clustered(333, 48, 333), 200),
        (smooth(24, 96), 64),
        (random(40, 16), 40),
        (random(3, 16), 2),
        (random(576, 4096), 64),
        (random(2880, 4096), 320),
    ],
    ids=["random", "all", "clusters", "near clusters", "smooth", "small", "three", "llava", "llava-next"],
)
def test_picks_as_the_plain_recurrence_does(features: Tensor, count: int) -> None:
    assert diverse(features, count).tolist() == plain(features, count)


def test_one_token_is_its_own_pick() -> None:
    assert kept(random(1, 8), 1.0) == [0]


def test_no_token_is_kept_twice_when_only_duplicates_are_left() -> None:
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert plain(features, 3) == [0, 2, 0]  # what the official code does
    assert kept(features, 0.75) == [0, 1, 2]


@pytest.mark.parametrize(("keep", "expected"), [(0.098, 56), (64, 64), (0.111, 64), (0.0001, 1)])
def test_published_counts(keep: int | float, expected: int) -> None:
    assert len(kept(random(576, 32), keep)) == expected
