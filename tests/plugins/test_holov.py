"""HoloV grants and keeps what the official code does, with its order and its rows of zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce.reducer import Grid, Selection, Span, Tile, VisualTokens
from tokenreduce.signals import EncoderAttention
from tokenreduce_plugins.holov import HoloV, crop_sizes, shares, worth

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored


def select(attention: Tensor, features: Tensor, keep: int, crops: int, **knobs: Any) -> Selection:
    """The choice, given what the class token attends to ``(tokens,)``."""
    reducer = HoloV(keep, crops=crops, **knobs)
    (step,) = reducer.steps(GEOMETRY)
    row = torch.cat([attention.new_zeros(1), attention])
    return show(reducer, step, features, {EncoderAttention(-2): stored(row[None, None], slice(1, None), class_token=0)})


def scores(attention: Tensor, features: Tensor, crops: int) -> Tensor:
    sizes = crop_sizes(len(attention), crops)
    return torch.stack([worth(*crop, 0.09) for crop in zip(attention.split(sizes), features.split(sizes), strict=True)])


@pytest.mark.parametrize("case", cases("holov"))
def test_official_vectors(case: Case) -> None:
    attention, features = case.given["attn"], case.given["x"]
    crops, keep = case.settings["crops"], case.settings["k"]
    assert_equal_floats(scores(attention, features, crops), case.expected["crop_score"])
    assert shares(scores(attention, features, crops), keep).equal(case.expected["allocated"])
    selection = select(attention, features, keep, crops)
    assert selection.index.equal(case.expected["position"])
    rows = features[selection.index] if selection.features is None else selection.features
    assert_equal_floats(rows, case.expected["features"])


@pytest.mark.parametrize("case", cases("holov"))
def test_other_crops_and_attention_alone_keep_others(case: Case) -> None:
    attention, features = case.given["attn"], case.given["x"]
    crops, keep = case.settings["crops"], case.settings["k"]
    expected = case.expected["position"]
    assert not select(attention, features, keep, crops + 1).index.equal(expected)
    assert not select(attention, features, keep, 1).index.sort().values.equal(expected.sort().values)
    assert not expected.equal(expected.sort().values), "the order is no raster"


NINE = torch.tensor([0.01, 0.09, 0.03, 0.02, 0.08, 0.04, 0.07, 0.05, 0.06])


@pytest.mark.parametrize(
    ("keep", "crops", "expected"),
    [
        (4, 3, [1, 4, 6, 8]),  # one, one and two
        (6, 3, [1, 4, 5, 6, 7, 8]),  # one, two, and a whole crop in raster order
        (5, 2, [1, 4, 6, 8, 7]),  # crops of five and four; two and three, the most attended first
    ],
)
def test_worked_examples(keep: int, crops: int, expected: list[int]) -> None:
    assert select(NINE, random(9, 4), keep, crops).index.tolist() == expected


def test_worked_example_of_crop_scores() -> None:
    """109 % of a thousand times the mean attention, whatever the features."""
    assert_equal_floats(scores(NINE, random(9, 4), 3), torch.tensor([47.2333, 50.8667, 65.4]))


def test_what_a_crop_cannot_use_becomes_rows_of_zeros() -> None:
    peaked = torch.tensor([0.01] * 6 + [0.3, 0.35, 0.29])
    features = random(9, 4)
    selection = select(peaked, features, 5, 3)
    assert selection.index.tolist() == [6, 7, 8, -1, -1]
    assert selection.features is not None
    assert selection.features[:3].equal(features[6:]) and not selection.features[3:].any()
    assert selection.sources(9).tolist() == [-1] * 6 + [0, 1, 2]


def test_the_zero_diagonal_counts_in_the_variance_of_likenesses() -> None:
    """Two tokens whose cosine is c: the mean is c, the diagonal's square is left, so the variance is c squared.

    Where that is as small as the 1e-6 that it is divided by the sum with, half of ``alpha`` counts.
    """
    cosine = 1e-3
    features = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])
    assert float(worth(torch.tensor([0.2, 0.4]), features, 1.0)) == pytest.approx(300 * 1.5, rel=1e-3)


def test_a_crop_of_one_token_has_its_plain_attention() -> None:
    """Crops of two, one and one: 109 % of 1000 * 0.1, 0.4 and 0.4 give the first one all of three tokens."""
    attention = torch.tensor([0.1, 0.1, 0.4, 0.4])
    assert_equal_floats(scores(attention, random(4, 3), 3), torch.tensor([109.0, 0.4, 0.4]))
    assert select(attention, random(4, 3), 3, 3).index.tolist() == [0, 1, -1]


def test_equal_attention_gives_equal_shares_and_what_is_left_to_the_first() -> None:
    assert shares(torch.full((4,), 0.25), 10).tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(("keep", "crops"), [(1, 16), (9, 1), (5, 20), (20, 3)])
def test_every_count_is_met(keep: int, crops: int) -> None:
    index = select(random(9).softmax(dim=0), random(9, 4), keep, crops).index
    assert len(index) == min(keep, 9)
    assert len(set(index[index >= 0].tolist())) == int((index >= 0).sum())


def test_all_tiles_of_a_picture_share_one_budget() -> None:
    reducer = HoloV(2, crops=2)
    (step,) = reducer.steps(GEOMETRY)
    tiles = (Tile(Grid(2, 2), role="thumbnail"), Tile(Grid(2, 2), role="crop"))
    views = [
        stored(torch.tensor([[row]]), slice(1, None), class_token=0)
        for row in ([0.0, 0.1, 0.2, 0.1, 0.1], [0.0, 0.8, 0.9, 0.1, 0.1])
    ]
    tokens = VisualTokens(random(8, 4), Span(GEOMETRY, tiles, 8, 8), 2, signals=lambda _: views)
    assert reducer.select(step, tokens).index.tolist() == [5, 4]


def test_without_a_class_token_attention_received_decides() -> None:
    geometry = replace(GEOMETRY, class_token=False)
    reducer, attention = HoloV(3, crops=1), random(4, 9, 9).softmax(dim=-1)
    (step,) = reducer.steps(geometry)
    selection = show(
        reducer, step, random(9, 2), {EncoderAttention(-2): stored(attention, slice(0, None))}, geometry=geometry
    )
    assert selection.index.tolist() == attention.mean(dim=(0, 1)).topk(3).indices.tolist()


def test_no_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="crops=0 is no number of crops: it must be at least 1"):
        HoloV(crops=0)
