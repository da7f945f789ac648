"""OTPrune picks what the official code picks, in its order, and what the kernel written out picks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import Grid, Span, Tile, VisualTokens
from tokenreduce_plugins.otprune import OtPrune, spanning

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show


def kept(features: Tensor, keep: int | float, **knobs: Any) -> list[int]:
    reducer = OtPrune(keep, **knobs)
    (step,) = reducer.steps(GEOMETRY)
    return show(reducer, step, features).index.tolist()


def kernel(features: Tensor, gamma: float = 0.01, *, per_token: bool = False, square: bool = True) -> Tensor:
    """The kernel in double precision; the last two are mistakes."""
    rows = normalize(features.double(), dim=1 if per_token else 0)
    likeness = rows @ rows.T
    return torch.eye(len(rows), dtype=torch.double) + gamma * (likeness @ likeness if square else likeness)


def greedy(matrix: Tensor, count: int) -> list[int]:
    """The picks that each add most to the log-determinant of the picked part of ``matrix``."""
    picked: list[int] = []
    for _ in range(count):
        gains = {
            place: float(torch.logdet(matrix[[*picked, place]][:, [*picked, place]]))
            for place in range(len(matrix))
            if place not in picked
        }
        picked.append(max(gains, key=lambda place: gains[place]))
    return picked


@pytest.mark.parametrize("case", cases("otprune"))
def test_official_vectors(case: Case) -> None:
    features, ratio = case.given["features"], case.settings["subset_ratio"]
    assert kept(features, ratio) == case.expected["kept"].tolist()
    assert kept(features, ratio, order="official") == case.expected["order"].tolist()
    rows, gamma = normalize(features, dim=0), case.settings["gamma"]
    assert spanning(rows, case.settings["k"], gamma).equal(case.expected["pick_order"])
    assert_equal_floats(kernel(features, gamma).diagonal().float(), case.expected["kernel_diag"])
    if "inputs_embeds" in case.expected:
        sequence = torch.cat([case.given["prefix"], features[case.expected["order"]], case.given["text"]])
        assert_equal_floats(sequence, case.expected["inputs_embeds"])


MISTAKES = {
    "per_token_instead_of_per_channel_norm": lambda features: kernel(features, per_token=True),
    "kernel_S_instead_of_S_squared": lambda features: kernel(features, square=False),
    "gamma_1": lambda features: kernel(features, 1.0),
    "gamma_0.1": lambda features: kernel(features, 0.1),
    "no_identity": lambda features: kernel(features) - (1 - 1e-9) * torch.eye(len(features), dtype=torch.double),
    "centred": lambda features: kernel(features - features.mean(dim=0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("case", cases("otprune")[:4])
def test_mistakes_in_the_kernel_keep_as_many_others_as_recorded(case: Case, mistake: str) -> None:
    """What the official code's kept set differs by is written down with every case."""
    features, count = case.given["features"], case.settings["k"]
    assert greedy(kernel(features), count) == case.expected["pick_order"].tolist()
    wrong = greedy(MISTAKES[mistake](features), count)
    assert len({*wrong} ^ {*case.expected["kept"].tolist()}) == case.about["sensitivity"][mistake]


@pytest.mark.parametrize("case", cases("otprune"))
def test_other_ways_to_choose_keep_as_many_others_as_recorded(case: Case) -> None:
    features, recorded = case.given["features"], case.about["sensitivity"]
    official, count = {*case.expected["kept"].tolist()}, case.settings["k"]
    at_once = kernel(features).diagonal().topk(count).indices.tolist()
    assert len({*at_once} ^ official) == recorded["diagonal_topk_no_greedy"]
    assert len({*spanning(features, count, 0.01).tolist()} ^ official) == recorded["no_norm"]
    tiles = case.settings["tiles"]
    if tiles > 1:
        each = len(features) // tiles
        apart = {
            part * each + place
            for part, tile in enumerate(features.split(each))
            for place in kept(tile, case.settings["subset_ratio"])
        }
        assert len(apart ^ official) == recorded["per_tile_instead_of_joint"]
    raster = "raster_order_instead_of_set_order (positions that differ)"
    order = case.expected["order"].tolist()
    assert sum(a != b for a, b in zip(order, sorted(order), strict=True)) == recorded[raster]


EXAMPLE = torch.tensor([[2.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 3], [1, 0, 1], [0, 2, 1]])


def test_worked_example() -> None:
    """Six tokens for three channels; a token's own norm would give 2, 5, 4, and no square 3 first."""
    assert spanning(normalize(EXAMPLE, dim=0), 4, 0.01).tolist() == [5, 3, 0, 2]
    assert_equal_floats(
        kernel(EXAMPLE).diagonal().float(), torch.tensor([1.00667, 1.00167, 1.00389, 1.00818, 1.00288, 1.00879])
    )
    assert greedy(kernel(EXAMPLE, per_token=True), 3) == [2, 5, 4]
    assert greedy(kernel(EXAMPLE, square=False), 1) == [3]


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.34, [3, 5]), (0.5, [0, 3, 5]), (0.75, [0, 2, 3, 5]), (0.25, [3, 5]), (1, [5])]
)
def test_counts_are_rounded_half_to_even(keep: int | float, expected: list[int]) -> None:
    assert kept(EXAMPLE, keep) == expected


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (9, 9), (1, 4)])
def test_picks_as_the_kernel_written_out_does(shape: tuple[int, int]) -> None:
    """Whether there are more tokens than channels or fewer."""
    features = random(*shape, seed=3)
    count = min(8, shape[0])
    assert spanning(normalize(features, dim=0), count, 1.0).tolist() == greedy(kernel(features, 1.0), count)


def test_everything_can_be_kept_once() -> None:
    assert kept(random(20, 5), 1.0) == kept(random(5, 20).T.contiguous(), 20) == list(range(20))


def test_a_channel_of_zeros_and_equal_tokens_change_nothing() -> None:
    features = random(12, 6)
    padded = torch.cat([features, torch.zeros(12, 2)], dim=1)
    assert kept(padded, 5) == kept(features, 5)
    assert kept(torch.ones(4, 3), 3) == [0, 1, 2]


def test_all_tiles_of_a_picture_are_one_pool() -> None:
    features, reducer = torch.cat([0.01 * random(4, 6), random(4, 6, seed=1)]), OtPrune(3)
    (step,) = reducer.steps(GEOMETRY)
    assert step.scope == "picture"
    tiles = (Tile(Grid(2, 2), role="thumbnail"), Tile(Grid(2, 2), role="crop"))
    selection = reducer.select(step, VisualTokens(features, Span(GEOMETRY, tiles, 8, 8), 3))
    assert min(selection.index.tolist()) >= 4


def test_a_kernel_that_is_the_identity_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma=0 tells no tokens apart: it must be above 0"):
        OtPrune(gamma=0)
