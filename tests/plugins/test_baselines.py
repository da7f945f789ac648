"""The baselines keep what they say, evenly, and the same every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce.reducer import AtInput, Geometry, Grid, Selection, Span, Tile, TokenReducer, VisualTokens
from tokenreduce_plugins.baselines import Downsample, NoImage, NoReduction, Pool, Random, Uniform

GEOMETRY = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
GRIDS = [Grid(24, 24), Grid(12, 12), Grid(9, 16), Grid(5, 3), Grid(1, 7)]


def span_of(grid: Grid) -> Span:
    return Span(GEOMETRY, (Tile(grid),), len(grid), len(grid))


def count(reducer: TokenReducer, grid: Grid) -> Any:
    (step,) = reducer.steps(GEOMETRY)
    return reducer.count(step, span_of(grid))


def select(reducer: TokenReducer, grid: Grid, features: Tensor | None = None, picture: int = 0) -> Selection:
    (step,) = reducer.steps(GEOMETRY)
    features = torch.arange(len(grid) * 2.0).reshape(len(grid), 2) if features is None else features
    tokens = VisualTokens(features, span_of(grid), reducer.count(step, span_of(grid)), fingerprint=lambda: picture)
    return reducer.select(step, tokens)


def test_no_reduction_acts_nowhere() -> None:
    assert NoReduction().steps(GEOMETRY) == []


def test_no_image_leaves_nothing_at_the_input() -> None:
    (step,) = NoImage().steps(GEOMETRY)
    assert isinstance(step, AtInput)
    assert count(NoImage(), Grid(24, 24)) == 0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("keep", [0.25, 0.11, 0.5, 1.0])
@pytest.mark.parametrize("method", [Random, Uniform, Pool])
def test_selection_has_the_promised_count(method: type[Random | Uniform | Pool], keep: float, grid: Grid) -> None:
    reducer = method(keep)
    index = select(reducer, grid).index
    assert len(index) == count(reducer, grid)
    assert index.tolist() == sorted(set(index.tolist()))
    assert set(index.tolist()) <= set(range(len(grid)))


@pytest.mark.parametrize("method", [Random, Uniform])
def test_counts_are_exact_where_no_grid_is_needed(method: type[Random | Uniform]) -> None:
    assert count(method(0.25), Grid(24, 24)) == 144
    assert count(method(100), Grid(24, 24)) == 100


def test_random_repeats_under_a_seed_and_differs_between_seeds_and_pictures() -> None:
    first = select(Random(seed=1), Grid(24, 24), picture=7).index
    assert first.equal(select(Random(seed=1), Grid(24, 24), picture=7).index)
    assert not first.equal(select(Random(seed=2), Grid(24, 24), picture=7).index)
    assert not first.equal(select(Random(seed=1), Grid(24, 24), picture=8).index)


def test_random_draws_every_token_equally_often() -> None:
    drawn = torch.zeros(16)
    for picture in range(2000):
        drawn[select(Random(4), Grid(4, 4), picture=picture).index] += 1
    # Each token is drawn with probability 1/4: 500 times, with a standard deviation of 19.4.
    assert (drawn - 500).abs().max() < 6 * 19.4


def test_random_nests() -> None:
    few, many = (set(select(Random(keep), Grid(24, 24)).index.tolist()) for keep in (0.1, 0.4))
    assert few < many


@pytest.mark.parametrize(("keep", "expected"), [(4, [2, 6, 10, 14]), (1, [8]), (16, list(range(16))), (3, [2, 8, 13])])
def test_uniform_takes_the_middle_of_equal_stretches(keep: int, expected: list[int]) -> None:
    assert select(Uniform(keep), Grid(4, 4)).index.tolist() == expected


def test_uniform_gaps_differ_by_at_most_one() -> None:
    gaps = select(Uniform(100), Grid(24, 24)).index.diff()
    assert gaps.max() - gaps.min() <= 1


def test_pool_averages_each_cell() -> None:
    selection = select(Pool(4), Grid(4, 4), torch.arange(16.0)[:, None])
    assert selection.features is not None and selection.source is not None
    assert selection.features[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert selection.index.tolist() == [5, 7, 13, 15]
    assert selection.source.reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.11])
def test_pool_loses_no_token_and_stands_inside_its_cells(grid: Grid, keep: float) -> None:
    features = torch.randn(len(grid), 3, generator=torch.Generator().manual_seed(0))
    selection = select(Pool(keep), grid, features)
    assert selection.features is not None and selection.source is not None
    sizes = selection.source.bincount(minlength=len(selection.index))
    assert sizes.min() >= 1
    torch.testing.assert_close(
        (selection.features * sizes[:, None]).sum(dim=0), features.sum(dim=0), atol=1e-4, rtol=1e-4
    )
    assert selection.source[selection.index].tolist() == list(range(len(selection.index)))


def test_pool_keeps_everything_and_the_dtype_when_nothing_is_to_go() -> None:
    features = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    selection = select(Pool(1.0), Grid(4, 4), features)
    assert selection.features is not None
    assert selection.features.dtype == torch.bfloat16
    assert selection.features.equal(features)


def test_pool_refuses_a_grid_with_holes() -> None:
    (step,) = Pool(4).steps(GEOMETRY)
    tokens = VisualTokens(torch.zeros(8, 2), Span(GEOMETRY, (Tile(Grid(4, 4)),), 16, 8), 4, index=torch.arange(8))
    with pytest.raises(ValueError, match="only 8 of 16 tokens are left"):
        Pool(4).select(step, tokens)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.11])
def test_downsample_and_pool_have_the_same_count_and_never_more_than_asked(grid: Grid, keep: float) -> None:
    pooled = count(Pool(keep), grid)
    assert count(Downsample(keep), grid) == pooled
    assert pooled is not None and 1 <= pooled <= max(1, round(keep * len(grid)))
    assert len(grid.fit(pooled)) == pooled  # the picture can be made exactly that small


def test_downsample_acts_at_the_input() -> None:
    (step,) = Downsample(0.25).steps(GEOMETRY)
    assert isinstance(step, AtInput)
    assert count(Downsample(0.25), Grid(24, 24)) == 144
    with pytest.raises(TypeError, match="Downsample has no step at which"):
        select(Downsample(0.25), Grid(4, 4))


@pytest.mark.parametrize("method", [Random, Uniform, Pool, Downsample])
@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.2])
def test_impossible_budgets_are_refused(method: type[Random | Uniform | Pool | Downsample], keep: float) -> None:
    with pytest.raises(ValueError, match="keep="):
        method(keep)
