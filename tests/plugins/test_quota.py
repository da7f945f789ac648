"""QuoTA shares a video's tokens as in its worked example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tokenreduce.reducer import Grid, Span, Tile
from tokenreduce.signals import Signal, View
from tokenreduce_plugins.quota import Quota, scaled, shares

from .golden import GEOMETRY, assert_equal_floats, random, show
from .videos import show_film

SCORES = [0.9, 0.6, 0.3, 0.05]


@dataclass(frozen=True)
class Useful(Signal):
    """How useful a frame is, one number."""

    def value(self, view: View) -> Any:
        return 1.0


def test_worked_example() -> None:
    assert shares(torch.tensor(SCORES), 784) == [503, 223, 55, 1]
    grid = Grid(27, 27)
    assert [scaled(grid, share) for share in (503, 223, 55, 1)] == [
        Grid(22, 22),
        Grid(15, 14),
        Grid(7, 7),
        Grid(1, 1),
    ]
    assert scaled(grid, 2000) == grid, "no map is made larger"


def test_frames_are_scaled_by_their_scores() -> None:
    reducer = Quota(784, scorer=Useful())
    (step,) = reducer.steps(GEOMETRY)
    tile = Tile(Grid(27, 27), role="frame")
    span = Span(GEOMETRY, (tile,) * 4, 4 * 729, 4 * 729)
    features = torch.full((4, 729, 2), 3.0)
    selection = show_film(reducer, step, features, {Useful(): SCORES}, span)
    frames = selection.index // 729
    assert frames.bincount().tolist() == [484, 210, 49, 1]
    assert selection.features is not None
    assert_equal_floats(selection.features, torch.full((744, 2), 3.0))
    assert len(selection.index.unique()) == len(selection.index)


def test_a_frame_with_less_than_one_token_is_dropped() -> None:
    assert shares(torch.tensor([1.0, 0.1]), 50) == [49, 0]


def test_without_any_score_all_frames_count_alike() -> None:
    assert shares(torch.zeros(4), 100) == [25] * 4


def test_an_image_stays_as_it_is() -> None:
    reducer = Quota(4, scorer=Useful())
    assert show(reducer, reducer.steps(GEOMETRY)[0], random(9, 2)).index.tolist() == list(range(9))


@pytest.mark.parametrize("share", range(1, 40))
def test_a_scaled_map_fits_its_share(share: int) -> None:
    assert 0 < len(scaled(Grid(4, 9), share)) <= share
