"""VScan keeps and merges what the official code does."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce.reducer import Geometry, Grid, Selection, Step
from tokenreduce.signals import Attention, EncoderAttention, LookAheadAttention
from tokenreduce.testing import visual_tokens
from tokenreduce_plugins.vscan import VScan

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored

WITHOUT = Geometry(encoder_layers=32, decoder_layers=28, feature_layer=31, class_token=False)
"""Qwen2.5-VL's own."""


def qwen(keep: float) -> VScan:
    return VScan(keep, window=4, share="capped", local_layer=7 / 32, global_layer=-1)


def first_cut(reducer: VScan, grid: Grid, features: Tensor, local: Attention, deep: Attention) -> Selection:
    step = reducer.steps(GEOMETRY)[0]
    layers = EncoderAttention(reducer.local_layer), EncoderAttention(reducer.global_layer)
    signals: dict[Hashable, Any] = dict(zip(layers, (local, deep), strict=True))
    tokens = visual_tokens(features, grid=grid, signals=signals)
    selection = reducer.select(step, tokens)
    assert reducer.count(step, tokens.span) == len(selection.index)
    return selection


def class_rows(scores: Tensor) -> Attention:
    """What the class token attends to, ``(heads, tokens)``, itself not among it."""
    return stored(scores[:, None], slice(None), class_token=0)


def mean_rows(scores: Tensor) -> Attention:
    """What tokens ``(tokens,)`` receive where there is no class token."""
    return stored(scores.expand(1, len(scores), -1), slice(None))


@pytest.mark.parametrize("case", cases("vscan"))
def test_official_vectors(case: Case) -> None:
    reducer = VScan(case.settings["T"])
    for sample in range(case.settings["B"]):
        views = [class_rows(case.given[name][sample]) for name in ("attn_local", "attn_global")]
        features = case.given["x"][sample]
        selection = first_cut(reducer, Grid(24, 24), features, *views)
        assert selection.index.equal(case.expected["kept"][sample])
        assert selection.features is not None
        assert_equal_floats(selection.features, case.expected["features"][sample])
        tokens = visual_tokens(features, grid=Grid(24, 24), signals={EncoderAttention(5 / 24): views[0]})
        local = reducer.local(tokens, case.settings["T"])
        assert local.sort().values.equal(case.expected["local"][sample])


@pytest.mark.parametrize("case", cases("vscan_qwen"))
def test_official_vectors_of_qwen(case: Case) -> None:
    reducer, grid = qwen(case.settings["ratio"]), Grid(case.settings["rows"], case.settings["cols"])
    views = [mean_rows(case.given[name]) for name in ("attn_local", "attn_global")]
    selection = first_cut(reducer, grid, case.given["x"], *views)
    assert selection.index.equal(case.expected["kept"])
    assert selection.features is not None
    assert_equal_floats(selection.features, case.expected["features"])
    tokens = visual_tokens(case.given["x"], grid=grid, signals={EncoderAttention(7 / 32): views[0]})
    local = reducer.local(tokens, len(selection.index))
    assert local.sort().values.equal(case.expected["local"].sort().values)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(192, 192), (128, 128), (96, 96), (64, 64), (32, 32), (100, 98), (48, 40), (1, 1), (576, 576)],
)
def test_counts(keep: int, expected: int) -> None:
    scores = random(1, 576).softmax(dim=-1)
    selection = first_cut(VScan(keep), Grid(24, 24), random(576, 4), class_rows(scores), class_rows(scores))
    assert len(selection.index) == expected


def test_merging() -> None:
    features = torch.tensor([[1.0, 0], [0.9, 0.1], [0.8, 0.3], [0.1, 0.7], [0, 1]])
    scores = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.4]])
    selection = first_cut(VScan(2), Grid(1, 5), features, class_rows(scores), class_rows(scores))
    assert selection.index.tolist() == [0, 4]
    assert selection.sources(5).tolist() == [0, 0, 0, 1, 1]
    assert selection.features is not None
    torch.testing.assert_close(selection.features, torch.tensor([[2.7 / 3, 0.4 / 3], [0.05, 0.85]]))


def test_a_local_token_is_not_picked_again() -> None:
    """Where only the local tokens 0 and 1 have global attention, setting that to 0 would let them tie with all others,
    and the first of these, themselves, be picked twice."""
    local = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0, 0]])
    deep = torch.tensor([[0.6, 0.4, 0, 0, 0, 0]])
    selection = first_cut(VScan(4), Grid(1, 6), random(6, 4), class_rows(local), class_rows(deep))
    assert selection.index.tolist() == [0, 1, 2, 3]


def test_left_over_rows_and_columns_belong_to_the_last_window() -> None:
    """Of a 5 x 9 grid in windows of 4 there are two, the second five columns wide: its first tokens are 4 and 8."""
    scores = torch.zeros(45)
    scores[[4, 8, 44, 0]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    tokens = visual_tokens(random(45, 4), grid=Grid(5, 9), signals={EncoderAttention(7 / 32): mean_rows(scores)})
    assert qwen(1.0).local(tokens, 4).tolist() == [0, 4]
    assert sorted(qwen(1.0).local(tokens, 7).tolist()) == [0, 4, 8]  # a share of 1.5 lets a window give two


@pytest.mark.parametrize("keep", [1, 2, 7, 19, 20])
@pytest.mark.parametrize("share", ["equal", "capped"])
@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(20, 1), Grid(2, 10)])
def test_any_budget_on_any_grid(keep: int, share: Any, grid: Grid) -> None:
    reducer = VScan(keep, window=4, share=share)
    scores = random(1, 20).softmax(dim=-1)
    selection = first_cut(reducer, grid, random(20, 4), class_rows(scores), class_rows(scores.flip(1)))
    assert len(selection.index.unique()) == len(selection.index) <= keep


def later(reducer: VScan, present: int, attention: dict[Hashable, Any], entered: int = 96) -> list[int]:
    step: Step = reducer.steps(GEOMETRY)[-1]
    return show(reducer, step, random(present, 4), attention, entered=entered).index.tolist()


def test_the_later_cut_goes_by_what_the_last_token_is_about_to_attend_to() -> None:
    """Two heads, which differ: the mean over heads counts, of the last query, over the visual tokens."""
    heads = torch.tensor([[0.1, 0.0, 0.5, 0.2, 0.1, 0.1], [0.1, 0.38, 0.0, 0.2, 0.2, 0.12]])
    probabilities = torch.stack([heads.flip(1), heads], dim=1)
    views: dict[Hashable, Any] = {LookAheadAttention(): stored(probabilities, slice(1, 5))}
    assert later(VScan(keeps=(2,)), 4, views) == [1, 2]  # 0.19, 0.25, 0.2, 0.15
    assert later(VScan(keeps=(3,)), 4, views) == [0, 1, 2]
    assert later(VScan(keeps=(0.3,)), 4, views) == [1]  # of the 4 that are there, not of the 96 that entered
    assert later(VScan(keeps=(32,)), 4, views) == [0, 1, 2, 3]
    unrotated: dict[Hashable, Any] = {LookAheadAttention(rotated=False): views[LookAheadAttention()]}
    assert later(VScan(keeps=(2,), rotated=False), 4, unrotated) == [1, 2]


def test_layers() -> None:
    first, second = VScan().steps(GEOMETRY)
    assert [signal.layer for signal in first.sees if isinstance(signal, EncoderAttention)] == [5 / 24, -2]
    assert GEOMETRY.encoder_layer(5 / 24) == 5 and WITHOUT.encoder_layer(7 / 32) == 7
    assert second.decoder_layer(GEOMETRY) == 16 and second.decoder_layer(WITHOUT) == 14


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"keeps": ()}, "one number or ratio for every layer"), ({"window": 0}, "window=0: a window has at least one")],
)
def test_knobs_that_do_not_fit_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VScan(**knobs)
