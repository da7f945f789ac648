"""A budget is met on counts alone: as nearly as the knob can, and refused where out of reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from transformers import LlamaConfig

from tokenreduce import available, create
from tokenreduce.budget import Budget, Currency, solve
from tokenreduce.counts import AdaptiveError, Layout, layer_counts
from tokenreduce.flops import decoder_flops, paper_flops
from tokenreduce.reducer import AtInput, AtProjector, Geometry, Grid, Keep, Step, Tile, TokenReducer

LLAVA = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
SQUARE = Layout((Tile(Grid(24, 24)),), text=64)
WIDE = Layout((Tile(Grid(12, 20)), Tile(Grid(30, 30), picture=1)), text=20)
DECODER = LlamaConfig()
ADAPTIVE = {"prumerge", "prumerge_plus", "vflowopt", "todre"}
VIDEOS_ONLY = {"dtd", "evs", "quota"}
"""They leave images whole."""
WITHOUT_KNOB = {"none", "no_image", "cmai", "yopo"}
INSIDE = {"fastv", "dart", "efficientvla", "llavolta", "pyramiddrop", "sparsevlm", "v2drop", "vtw"}
"""They drop inside the language model: what enters is always everything."""
HALVES = {"catp"}
"""They drop half of what goes inside the language model: at least half of everything enters."""


def solved(
    name: str, currency: Currency, value: Keep, layouts: Sequence[Layout] = (SQUARE,), **knobs: object
) -> tuple[TokenReducer, float]:
    solution = solve(create(name, **knobs), Budget(currency, value), LLAVA, layouts, DECODER)
    return solution.reducer, solution.expected


def mean(reducer: TokenReducer, layout: Layout = SQUARE) -> float:
    return sum(layer_counts(reducer, LLAVA, layout)) / LLAVA.decoder_layers


@pytest.mark.parametrize(("value", "keep"), [(192, 166), (128, 98), (64, 30)])
def test_fastv_at_the_published_layer_means_keeps_the_published_numbers(value: int, keep: int) -> None:
    reducer, expected = solved("fastv", "layer_mean", value)
    assert reducer == create("fastv", keep=keep), "the run is the very one that a setting by hand gives"
    assert expected == mean(reducer) == pytest.approx(value, abs=0.5)


def test_a_method_that_decides_late_may_know_how_many_tokens_enter() -> None:
    assert solved("todre", "tokens", 64) == (create("todre", keep=64), 64)


def test_published_settings_have_the_published_layer_means() -> None:
    assert mean(create("pyramiddrop")) == 270
    assert mean(create("vtw", layer=15)) == 270
    assert mean(create("sparsevlm")) == pytest.approx(206.5, abs=0.1)
    assert mean(create("dart", keep=128)) == 159.75
    assert mean(create("vscan_64")) == mean(create("apet_64")) == 64
    assert mean(create("v2drop_llava")) == pytest.approx(202.8, abs=0.05)
    assert mean(create("tome", keep=192)) == mean(create("flowcut", keep=192)) == 192


def test_planned_counts_give_the_flops_that_papers_print() -> None:
    """PyramidDrop's table: 3.82 T in full, FastV 2.01, its own 1.78, with three matrices and without the text."""
    full = [576] * 32

    def share(name: str, matrices: int, **knobs: object) -> float:
        counts = layer_counts(create(name, **knobs), LLAVA, SQUARE)
        return paper_flops(counts, DECODER, matrices) / paper_flops(full, DECODER, matrices)

    assert paper_flops(full, DECODER, 3) / 1e12 == pytest.approx(3.82, abs=0.005)
    assert share("fastv", 3) == pytest.approx(2.01 / 3.82, abs=0.002)
    assert share("pyramiddrop", 3) == pytest.approx(1.78 / 3.82, abs=0.002)
    assert share("fastv", 2, layer=3) == pytest.approx(0.54, abs=0.002)


@pytest.mark.parametrize("currency", ["tokens", "layer_mean", "flops"])
@pytest.mark.parametrize(("value", "layouts"), [(0.5, (SQUARE,)), (0.34, (SQUARE, WIDE))])
@pytest.mark.parametrize("name", sorted({*available("reducers")} - ADAPTIVE - VIDEOS_ONLY - WITHOUT_KNOB - {"chain"}))
def test_every_method_can_cost_the_same(
    made: Callable[[str], TokenReducer], name: str, layouts: Sequence[Layout], value: float, currency: Currency
) -> None:
    if currency == "tokens" and name in INSIDE:
        with pytest.raises(ValueError, match=r"it always costs \d+ visual tokens entering .* use budget=layer_mean"):
            solve(made(name), Budget(currency, value), LLAVA, layouts, DECODER)
        return
    if currency == "tokens" and name in HALVES:
        value = (1 + value) / 2
    solution = solve(made(name), Budget(currency, value), LLAVA, layouts, DECODER)
    assert solution.least < solution.asked < solution.most
    counts = [layer_counts(solution.reducer, LLAVA, layout) for layout in layouts]
    match currency:
        case "tokens":
            spent = [float(each[0]) for each in counts]
        case "layer_mean":
            spent = [sum(each) / 32 for each in counts]
        case "flops":
            texts = [layout.text for layout in layouts]
            spent = [decoder_flops([text + n for n in each], DECODER) for text, each in zip(texts, counts, strict=True)]
    assert solution.expected == pytest.approx(sum(spent) / len(layouts))
    coarse = 0.03 if name in {"fopru_row", "downsample", "pool", "vtw"} else 0.005
    coarse = 0.07 if name == "llavolta" else coarse  # between strides of 2 and 3
    assert solution.expected / solution.whole == pytest.approx(value, abs=coarse)


def test_a_share_stays_a_ratio_and_a_short_one_where_pictures_differ() -> None:
    reducer, _ = solved("fopru_rank", "tokens", 0.11)
    assert reducer == create("fopru_rank", keep=0.11), "63 of 576, as by hand"
    reducer, _ = solved("fopru_row", "tokens", 0.25)
    assert reducer == create("fopru_row", keep=0.25), "0.26 would give the same rows"
    reducer, expected = solved("divprune", "layer_mean", 300, (SQUARE, WIDE))
    assert isinstance(keep := reducer.knobs()["keep"], float) and len(str(keep)) <= 8
    assert expected == pytest.approx(300, abs=1)


def test_a_whole_budget_changes_nothing() -> None:
    for name in ("fastv", "pyramiddrop", "random", "tome"):
        reducer, expected = solved(name, "layer_mean", 1.0)
        assert expected == mean(reducer) == 576


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pyramiddrop", 100, r"PyramidDrop cannot cost a layer mean of 100 .* can cost 144\.8 to 576, 0\.251 to 1 of"),
        ("fastv", 30, r"FastV cannot cost a layer mean of 30 .*: on this model it can cost 36\.94 to 576"),
        ("vtw", 575, r"it can cost 18 to 558, 0\.0312 to 0\.969 of the whole"),
        ("visionzip", 0.001, "it can cost 2 to 576"),
        ("fopru_row", 23, "it can cost 24 to 576"),
        ("none", 0.5, r"NoReduction has no knob .* meets no budget: it costs a layer mean of 576 visual tokens"),
        ("no_image", 0.5, r"NoImage has no knob .*: it costs a layer mean of 0 visual tokens"),
        ("evs", 0.5, r"Evs cannot cost a layer mean of 288 .*: on this model it always costs a layer mean of 576"),
        ("dtd", 0.5, r"Dtd has no knob .*: it costs a layer mean of 576 visual tokens"),
        ("prumerge", 0.5, r"PruMerge decides by the picture how many tokens it keeps"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_range(name: str, value: Keep, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solved(name, "layer_mean", value)


@pytest.mark.parametrize(
    ("currency", "value", "message"),
    [
        ("flop", 0.5, "budget=flop is no currency: choose one of tokens, layer_mean, flops"),
        ("flops", 192, "budget.value=192: a budget of FLOPs is a ratio"),
        ("tokens", 192.0, "budget.value: keep=192.0 is not a ratio .* write 192"),
        ("tokens", 0, "at least 1"),
        ("tokens", "much", "budget.value='much' is not a number"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(currency: Currency, value: Keep, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(currency, value)


def test_in_a_chain_the_last_reducer_meets_the_budget() -> None:
    chain = create("chain", reducers=[{"name": "divprune", "keep": 288}, {"name": "fastv", "keep": 0.5}])
    solution = solve(chain, Budget("layer_mean", 128), LLAVA, [SQUARE], DECODER)
    before, last = solution.reducer.parts()
    assert before == create("divprune", keep=288)
    assert isinstance(keep := last.knobs()["keep"], int)
    assert (2 * 288 + 30 * keep) / 32 == solution.expected == pytest.approx(128, abs=0.5)
    assert solution.most == 288


def test_special_tokens_count_while_a_visual_one_is_left() -> None:
    lines = Layout((Tile(Grid(24, 24)),), special=24, text=64)
    assert layer_counts(create("random", keep=100), LLAVA, lines) == (124,) * 32
    assert layer_counts(create("no_image"), LLAVA, lines) == (0,) * 32


@dataclass(frozen=True)
class Undecided(TokenReducer):
    """Adaptive first, and then at most 100."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(), AtProjector(keep=100)]


@dataclass(frozen=True)
class Shrinking(TokenReducer):
    """A smaller picture, of which the model itself decides how much it takes."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtInput(keep=0.25), AtProjector()]


def test_an_adaptive_step_matters_only_where_it_has_the_last_word() -> None:
    assert layer_counts(Undecided(), LLAVA, SQUARE) == (100,) * 32
    with pytest.raises(AdaptiveError, match="Shrinking decides by the picture"):
        layer_counts(Shrinking(), LLAVA, SQUARE)
