"""Counts, grids, layers and ties: what every reducer builds on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tokenreduce.reducer
from tokenreduce import create
from tokenreduce.reducer import (
    AtProjector,
    Geometry,
    Grid,
    Rounding,
    Span,
    Tile,
    VisualTokens,
    best,
    cover,
    layer_index,
    merge,
    tokens_to_keep,
)
from tokenreduce.signals import TokenSizes

SPAN = Span(Geometry(4, 4, 2, True), (Tile(Grid(3, 3)),), 9, 9)


@pytest.mark.parametrize(
    ("keep", "total", "rounding", "expected"),
    [
        (0.25, 576, "floor", 144),
        (0.002, 576, "floor", 1),
        (0.001, 576, "floor", 1),
        (1.0, 7, "floor", 7),
        (0.5, 9, "floor", 4),
        (0.5, 9, "round", 5),
        (0.5, 9, "ceil", 5),
        (0.29, 100, "floor", 29),  # 0.29 * 100 is 28.999999999999996
        (0.07, 100, "ceil", 7),  # 0.07 * 100 is 7.000000000000001
        (144, 144, "floor", 144),
        (1, 144, "floor", 1),
    ],
)
def test_keep_means_a_count(keep: float, total: int, rounding: str, expected: int) -> None:
    assert tokens_to_keep(keep, total, rounding) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, 144.0, float("nan")])
def test_a_keep_that_means_nothing_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=f"keep={keep}"):
        create("random", keep=keep)


def test_a_count_given_as_a_float_is_explained() -> None:
    with pytest.raises(ValueError, match="for a number of tokens write 144"):
        create("random", keep=144.0)


def test_where_fewer_tokens_are_there_all_are_kept() -> None:
    assert tokens_to_keep(145, 144) == 144


@pytest.mark.parametrize(("rounding", "expected"), [("floor", 2), ("round", 3), ("even", 2), ("ceil", 3)])
def test_a_step_says_how_many_it_leaves(rounding: Rounding, expected: int) -> None:
    reducer, span = create("random"), replace(SPAN, entered=5)
    assert reducer.count(AtProjector(keep=0.5, rounding=rounding), span) == span.keep(0.5, rounding) == expected
    assert reducer.count(AtProjector(keep=7), span) == 5
    assert reducer.count(AtProjector(), span) is None


def test_tokens_give_the_best_the_others_and_all() -> None:
    tokens = VisualTokens(torch.zeros(5, 1), SPAN, 2)
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.5])
    assert tokens.best(scores).tolist() == [1, 3]
    assert tokens.best(scores, 3).tolist() == [1, 2, 3]
    assert tokens.others(tokens.best(scores)).tolist() == [0, 2, 4]
    selection = tokens.everything(carry="kept")
    assert (selection.index.tolist(), selection.carry) == ([0, 1, 2, 3, 4], "kept")


def test_a_method_that_keeps_none_needs_no_choice() -> None:
    tokens = VisualTokens(torch.zeros(5, 1), SPAN, 0)
    assert create("vtw").select(AtProjector(), tokens).index.tolist() == []


@pytest.mark.parametrize("value", [True, "0.25", None])
def test_keep_must_be_a_number(value: object) -> None:
    with pytest.raises(ValueError, match="keep="):
        create("random", keep=value)


def test_ties_go_to_the_token_that_comes_first() -> None:
    assert best(torch.tensor([0.5, 0.5, 0.5, 0.1, 0.5]), 2).tolist() == [0, 1]
    assert best(torch.zeros(2000), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize("grid", [Grid(6, 6), Grid(4, 9), Grid(9, 4)])
def test_a_fitted_grid_fits(grid: Grid, count: int) -> None:
    fitted = grid.fit(count)
    assert len(fitted) <= min(count, len(grid))
    assert fitted.height <= grid.height
    assert fitted.width <= grid.width
    assert grid.fit(len(fitted)) == fitted


def test_a_fitted_grid_is_full_where_it_can_be() -> None:
    assert Grid(24, 24).fit(144) == Grid(12, 12)
    assert Grid(24, 24).fit(576) == Grid(24, 24)
    assert len(Grid(12, 12).fit(72)) == 72


def test_cells_partition_the_grid() -> None:
    fine, coarse = Grid(7, 5), Grid(3, 2)
    centres, cell = fine.cells(coarse)
    assert sorted(cell.unique().tolist()) == list(range(6))
    assert cell[centres].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("layer", "depth", "index"), [(0, 24, 0), (-2, 24, 22), (0.0625, 32, 2), (0.5, 5, 3), (0.99, 6, 5)]
)
def test_layers_are_absolute_negative_or_a_fraction(layer: float, depth: int, index: int) -> None:
    assert layer_index(layer, depth) == index


@pytest.mark.parametrize("layer", [24, -25, 1.0, -0.5])
def test_a_layer_that_does_not_exist_is_refused(layer: float) -> None:
    with pytest.raises(ValueError, match=f"layer={layer}"):
        layer_index(layer, 24)


def test_randomness_comes_from_the_seed_and_the_picture() -> None:
    def draw(seed: int, picture: int) -> list[int]:
        tokens = VisualTokens(torch.zeros(9, 1), SPAN, 4, fingerprint=lambda: picture)
        return torch.randperm(9, generator=tokens.generator(seed)).tolist()

    assert draw(0, 1) == draw(0, 1)
    assert draw(0, 1) != draw(1, 1)
    assert draw(0, 1) != draw(0, 2)


def test_an_undeclared_signal_is_refused() -> None:
    tokens = VisualTokens(torch.zeros(9, 1), SPAN, 4)
    with pytest.raises(KeyError, match="list it in the step's `sees`"):
        tokens[TokenSizes()]


def test_cover_picks_what_a_literal_greedy_search_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(13, 9, generator=generator, dtype=torch.float64)
    weights, gains = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (13, 9))

    def worth(columns: list[int]) -> float:
        return float(weights @ rows[:, columns].amax(1) + gains[columns].sum())

    expected: list[int] = []
    for _ in range(9):
        expected.append(max(set(range(9)) - {*expected}, key=lambda column: worth([*expected, column])))
    assert cover(rows, 9, weights, gains).tolist() == expected
    assert cover(rows, 9).tolist() != cover(rows, 9, weights).tolist() != expected
    monkeypatch.setattr(tokenreduce.reducer, "_AT_ONCE", 20)  # two rows
    assert cover(rows, 9, weights, gains).tolist() == expected


def test_cover_multiplies_what_a_column_covers_and_not_what_it_adds_in_any_case() -> None:
    rows, factors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.1, 1.0])
    assert cover(rows, 1).tolist() == [0]
    assert cover(rows, 1, factors=factors).tolist() == [1], "0.1 * 2 against 1"
    assert cover(rows, 1, gains=torch.tensor([0.9, 0.0]), factors=factors).tolist() == [0], "0.1 * 2 + 0.9 against 1"


def test_cover_takes_the_first_of_equals_and_repeats_none() -> None:
    assert cover(torch.ones(3, 4), 4).tolist() == [0, 1, 2, 3]
    assert cover(torch.ones(3, 4), 2, gains=torch.tensor([0.0, 0.0, 1.0, 0.0])).tolist() == [2, 0]
    assert cover(torch.ones(0, 4), 2).tolist() == [0, 1], "where nothing is to be covered"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_adds_the_rows_of_every_group(dtype: torch.dtype) -> None:
    rows = torch.randint(-8, 8, (50, 3), generator=torch.Generator().manual_seed(0)).to(dtype)  # sums are exact
    group = torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    sums = torch.stack([rows[group == each].sum(dim=0) for each in range(9)])
    sizes = torch.stack([(group == each).sum() for each in range(9)])
    assert merge(rows, group, 9, "sum").equal(sums)
    torch.testing.assert_close(merge(rows, group, 9), sums / sizes.clamp(min=1)[:, None].to(dtype))
