"""ToDRE picks and drops by the paper's rules, on numbers small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import reduce_tokens
from tokenreduce.reducer import Grid, Span, Tile, VisualTokens
from tokenreduce.signals import Attention, EncoderAttention
from tokenreduce.testing import prompts
from tokenreduce_plugins.todre import ToDre, ignored, unlike

from .golden import GEOMETRY, random, show, stored

DEGREES = [0.0, 8, 30, 95, 110, 170, 205, 260, 311]


def directions(degrees: Sequence[float]) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def class_row(scores: Sequence[float]) -> Attention:
    return stored(torch.tensor(scores)[None, None], slice(None), class_token=0)


def kept(reducer: ToDre, features: Tensor, tiles: Sequence[Tile], scores: Sequence[Sequence[float]]) -> list[int]:
    """What the first step keeps of tiles whose class tokens attend to their tokens as ``scores`` say."""
    step, views = reducer.steps(GEOMETRY)[0], [class_row(each) for each in scores]
    span = Span(GEOMETRY, tuple(tiles), len(features), len(features))
    owner = torch.arange(len(tiles)).repeat_interleave(torch.tensor([len(tile.grid) for tile in tiles]))
    tokens = VisualTokens(features, span, reducer.keep, tile=owner, signals={EncoderAttention(-1): views}.__getitem__)
    return reducer.select(step, tokens).index.tolist()


@pytest.mark.parametrize(
    ("pivot", "expected"),
    [(4, [4, 8, 6, 2]), (0, [0, 5, 7, 3, 8])],  # the farthest from its nearest would be 4, 8, 6, 1 and 0, 5, 7, 3, 2
)
def test_worked_example(pivot: int, expected: list[int]) -> None:
    unit = directions(DEGREES)
    assert unlike(unit, torch.tensor([pivot]), len(expected)).tolist() == expected
    scores = [0.9 if place == pivot else 0.1 for place in range(9)]
    long = 3 * unit * torch.arange(1, 10)[:, None]  # lengths do not count
    assert kept(ToDre(len(expected)), long, [Tile(Grid(3, 3))], [scores]) == sorted(expected)


def test_the_sum_decides_and_not_the_nearest() -> None:
    """Behind 0 and 180 degrees all sums are 0 but for rounding; a third at 90 makes -90 the least."""
    assert unlike(directions([0, 180, 90, 45, 265]), torch.tensor([0]), 4).tolist()[-1] == 4
    near = directions([0, 170, 180, 190, 100])
    assert unlike(near, torch.tensor([0]), 3).tolist() == [0, 2, 4]  # 100 degrees: -0.17 - 0.98 * ... is the least left


def test_all_pictures_of_a_prompt_compete() -> None:
    tiles = [Tile(Grid(1, 3)), Tile(Grid(1, 3), picture=1)]
    features = directions([0, 1, 2, 3, 120, 240])
    assert kept(ToDre(3), features, tiles, [[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]]) == [0, 4, 5]
    assert kept(ToDre(1), features, tiles, [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]) == [5]


def test_of_a_picture_that_is_cut_up_the_overview_gives_the_first() -> None:
    overview, part = Tile(Grid(1, 2), role="thumbnail"), Tile(Grid(1, 2), role="crop")
    features = directions([0, 40, 80, 120])
    scores = [[0.1, 0.3], [0.9, 0.1]]
    assert kept(ToDre(1), features, [overview, part], scores) == [1]
    assert kept(ToDre(1), features, [part, part], scores) == [2]


HEADS = torch.tensor(
    [
        # before, four visual ones, two of text
        [[0.80, 0.02, 0.02, 0.02, 0.02, 0.12, 0.00], [0.62, 0.02, 0.02, 0.02, 0.02, 0.20, 0.10]],
        [[0.64, 0.04, 0.04, 0.04, 0.04, 0.20, 0.00], [0.60, 0.01, 0.01, 0.01, 0.01, 0.26, 0.10]],
    ]
)
"""Text pays visual tokens 0.08 and 0.08 in one head, 0.16 and 0.04 in the other: 0.09 on average."""


def inside(to_text: float, causal: bool = False) -> Attention:
    visual = torch.zeros(2, 4, 7)
    visual[..., 0], visual[..., 5] = 1 - to_text, to_text
    weights = torch.cat([torch.zeros(2, 1, 7), visual, HEADS], dim=1)
    view = stored(weights, slice(1, 5), text=torch.tensor([5, 6]))
    return view if not causal else type(view)(**{**vars(view), "causal": True})


@pytest.mark.parametrize(
    ("threshold", "to_text", "expected"),
    [(0.0901, 0.0, True), (0.0899, 0.0, False), (0.1, 0.05, True), (0.1, 0.2, False)],
)
def test_both_must_ignore_each_other(threshold: float, to_text: float, expected: bool) -> None:
    assert ignored(inside(to_text), threshold) is expected
    step = ToDre(layer=28).steps(GEOMETRY)[1]
    selection = show(ToDre(threshold=threshold), step, random(4, 3), {step.sees[0]: inside(to_text)})
    assert selection.index.tolist() == ([] if expected else [0, 1, 2, 3])


def test_without_text_nothing_is_dropped() -> None:
    assert not ignored(stored(torch.zeros(1, 3, 3), slice(0, 3), text=torch.tensor([], dtype=torch.long)), 0.5)


def test_the_late_layer() -> None:
    late = ToDre().steps(GEOMETRY)[1]
    assert late.decoder_layer(GEOMETRY) == 28 and late.sees[0].layer == 27


def test_in_a_model(llava: LlavaForConditionalGeneration) -> None:
    """All visual tokens are gone behind the late layer, or none."""
    inputs: dict[str, Any] = prompts(llava, [2])
    lengths = {}
    for threshold in (1e-6, 1.0):
        with torch.no_grad(), reduce_tokens(llava, ToDre(0.5, threshold=threshold)) as reduction:
            llava(**inputs)
        lengths[threshold] = reduction.samples[0].lengths
        entering = reduction.samples[0].entering
    text = inputs["input_ids"].shape[1] - reduction.samples[0].visual_tokens
    assert entering == reduction.samples[0].visual_tokens // 2
    assert lengths[1e-6] == (text + entering,) * len(lengths[1.0])
    assert lengths[1.0][-1] == text


def test_a_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a ratio"):
        ToDre(threshold=0.0)
