"""FoPru's rules on matrices small enough to follow by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenreduce.reducer import Count, Geometry, Grid, Span, Tile, TokenReducer, VisualTokens
from tokenreduce.signals import Attention, EncoderAttention, Rows
from tokenreduce_plugins.fopru import FoPruRank, FoPruRow, significance

GEOMETRY = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)

NINE = torch.tensor([0.10, 0.90, 0.30, 0.20, 0.80, 0.40, 0.70, 0.50, 0.60])

TWO_HEADS = torch.tensor(
    [
        [
            [0.2, 0.1, 0.3, 0.1, 0.3],
            [0.5, 0.1, 0.2, 0.1, 0.1],
            [0.1, 0.1, 0.4, 0.1, 0.3],
            [0.3, 0.1, 0.3, 0.1, 0.2],
            [0.2, 0.1, 0.3, 0.0, 0.4],
        ],
        [
            [0.2, 0.2, 0.2, 0.2, 0.2],
            [0.3, 0.3, 0.2, 0.1, 0.1],
            [0.3, 0.1, 0.2, 0.1, 0.3],
            [0.1, 0.1, 0.5, 0.1, 0.2],
            [0.4, 0.1, 0.1, 0.2, 0.2],
        ],
    ]
)

GIVEN_VARIES = torch.cat(
    [
        torch.full((1, 1, 5), 0.2),
        torch.cat([given := torch.tensor([[[0.8], [0.0], [0.6], [0.4]]]), ((1 - given) / 4).expand(1, 4, 4)], dim=2),
    ],
    dim=1,
)
"""One head: patches look at the class token with .8, 0, .6 and .4 and spread the rest evenly."""


def view(probabilities: Tensor, class_token: bool) -> Attention:
    """Stored probabilities ``(heads, sequence, sequence)`` as the attention that would give them."""
    identity = torch.eye(probabilities.shape[-1]).expand(len(probabilities), -1, -1)
    start = int(class_token)
    logits = probabilities.clamp_min(1e-30).log()  # -inf would turn the products with zeros into NaN
    return Attention(logits, identity, identity, 1.0, visual=slice(start, None), class_token=0 if class_token else None)


def received_only(scores: Tensor) -> Attention:
    """An encoder without class token in which every token attends to the others in proportion to ``scores``."""
    return view((scores / scores.sum()).expand(1, len(scores), len(scores)), class_token=False)


def kept(reducer: TokenReducer, attention: Attention, grid: Grid) -> list[int]:
    (step,) = reducer.steps(GEOMETRY)
    span = Span(GEOMETRY, (Tile(grid),), len(grid), len(grid))
    signals = {signal: attention for signal in step.sees}
    tokens = VisualTokens(
        torch.zeros(len(grid), 2), span, reducer.count(step, span), signals=lambda signal: [signals[signal]]
    )
    selection = reducer.select(step, tokens)
    assert selection.features is None
    assert len(selection.index) == tokens.keep
    return selection.index.tolist()


def count(reducer: TokenReducer, grid: Grid) -> Count:
    (step,) = reducer.steps(GEOMETRY)
    return reducer.count(step, Span(GEOMETRY, (Tile(grid),), len(grid), len(grid)))


@pytest.mark.parametrize(("keep", "expected"), [(1, [1]), (2, [1, 4]), (3, [1, 4, 6]), (4, [1, 4, 6, 8])])
def test_rank_keeps_the_most_significant_in_raster_order(keep: int, expected: list[int]) -> None:
    assert kept(FoPruRank(keep), received_only(NINE), Grid(3, 3)) == expected


@pytest.mark.parametrize(("keep", "expected"), [(1 / 3, [6, 7, 8]), (2 / 3, [3, 4, 5, 6, 7, 8]), (3, [6, 7, 8])])
def test_row_keeps_the_most_significant_rows_whole(keep: float, expected: list[int]) -> None:
    assert kept(FoPruRow(keep), received_only(NINE), Grid(3, 3)) == expected


def test_class_token_dropped_without_renormalising() -> None:
    attention = view(TWO_HEADS, class_token=True)
    received, given = attention.mean().mean(dim=0), attention.mean().mean(dim=1)
    torch.testing.assert_close(received, torch.tensor([0.125, 0.275, 0.1, 0.225]))
    torch.testing.assert_close(given, torch.tensor([0.15, 0.2, 0.2, 0.175]))
    assert received.var(correction=0).item() == pytest.approx(0.00512, abs=5e-6)
    assert given.var(correction=0).item() == pytest.approx(0.00043, abs=5e-6)
    torch.testing.assert_close(significance(attention), received)
    assert kept(FoPruRank(2), attention, Grid(2, 2)) == [1, 3]
    assert kept(FoPruRow(0.5), attention, Grid(2, 2)) == [0, 1]


def test_attention_given_is_used_where_it_varies_more() -> None:
    attention = view(GIVEN_VARIES, class_token=True)
    torch.testing.assert_close(attention.mean().mean(dim=0), torch.full((4,), 0.1375))
    torch.testing.assert_close(significance(attention), torch.tensor([0.05, 0.25, 0.10, 0.15]))
    assert kept(FoPruRank(2), attention, Grid(2, 2)) == [1, 3]


class Stored(Attention):
    """Attention among the visual tokens that is known to the last bit."""

    def mean(self, queries: Rows | None = None, keys: Rows | None = None) -> Tensor:
        return self.values[0]


def test_equal_variances_take_the_attention_given() -> None:
    given = torch.tensor([4.0, 2.0, 1.0, 1.0]) / 8
    weights = given[:, None] * given.flip(0)  # columns have the same means as rows, in the other order
    states = torch.empty(1, 5, 0)
    attention = Stored(states, states, weights[None], 1.0, visual=slice(1, None), class_token=0)
    assert significance(attention).equal(given / 4)


def test_with_the_class_token_attention_received_always_decides() -> None:
    attention = view(GIVEN_VARIES, class_token=True)
    received = attention.rows(slice(None)).mean(dim=(0, 1))[1:]
    torch.testing.assert_close(significance(attention, include_cls=True), received)
    full = attention.rows(slice(None)).mean(dim=0).mean(dim=1)
    torch.testing.assert_close(full, torch.full((5,), 0.2))  # every row sums to 1: attention given tells nothing apart

    received = view(TWO_HEADS, class_token=True).rows(slice(None)).mean(dim=(0, 1))[1:]
    assert kept(FoPruRank(2, include_cls=True), view(TWO_HEADS, class_token=True), Grid(2, 2)) == sorted(
        received.topk(2).indices.tolist()
    )


def test_without_a_class_token_attention_received_always_decides() -> None:
    spread = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(3)).softmax(dim=-1)
    torch.testing.assert_close(significance(view(spread, class_token=False)), spread.mean(dim=(0, 1)))


def test_including_the_class_token_can_change_the_choice() -> None:
    weights = torch.full((1, 5, 5), 0.2)
    weights[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])  # only the class token looks at token 0
    weights[0, 1:, 1:] = torch.tensor([0.1, 0.2, 0.2, 0.3])
    attention = view(weights, class_token=True)
    assert kept(FoPruRank(1), attention, Grid(2, 2)) == [3]
    assert kept(FoPruRank(1, include_cls=True), attention, Grid(2, 2)) == [0]


def test_rank_and_row_agree_on_a_quarter_of_llava() -> None:
    assert count(FoPruRank(0.25), Grid(24, 24)) == count(FoPruRow(0.25), Grid(24, 24)) == 144


@pytest.mark.parametrize(
    ("keep", "rounding", "expected"),
    [
        (0.002, "floor", 1),
        (0.002, "ceil", 2),
        (0.003, "round", 2),
        (0.001, "floor", 1),
        (0.0026, "round", 1),
        (1.0, "ceil", 576),
    ],
)
def test_rank_counts(keep: float, rounding: str, expected: int) -> None:
    assert count(FoPruRank(keep, rounding=rounding), Grid(24, 24)) == expected


@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        (0.002, 1),
        (1.5 / 24, 2),
        (1.49 / 24, 1),
        (2.5 / 24, 3),
        (1.0, 24),
        (144, 6),
        (1, 1),
        (36, 2),
        (35, 1),
        (64, 3),
        (576, 24),
    ],
)
def test_row_budget_is_the_nearest_number_of_whole_rows(keep: float, rows: int) -> None:
    assert count(FoPruRow(keep), Grid(24, 24)) == rows * 24


def test_row_counts_in_the_width_of_the_grid() -> None:
    assert count(FoPruRow(0.5), Grid(height=4, width=7)) == 14


@pytest.mark.parametrize("reducer", [FoPruRank(10), FoPruRow(10)])
def test_of_a_small_image_all_is_kept(reducer: TokenReducer) -> None:
    assert count(reducer, Grid(3, 3)) == 9


def test_ties_go_to_the_token_that_comes_first() -> None:
    tied = torch.tensor([0.5, 0.5, 0.5, 0.1, 0.5, 0.1])
    assert kept(FoPruRank(2), received_only(tied), Grid(2, 3)) == [0, 1]
    assert kept(FoPruRow(3), received_only(torch.full((6,), 1.0)), Grid(2, 3)) == [0, 1, 2]


def test_the_layer_is_the_one_asked_for() -> None:
    (step,) = FoPruRank(layer=5).steps(GEOMETRY)
    assert step.sees == (EncoderAttention(5),)
    (step,) = FoPruRow().steps(GEOMETRY)
    assert step.sees == (EncoderAttention(-2),)
