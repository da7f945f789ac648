"""VFlowOpt merges what global tokens do not attend to, cell by cell, and its search keeps to the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import calibrate, create, reduce_tokens
from tokenreduce.reducer import Grid, Selection, Span, Tile, TokenReducer, VisualTokens
from tokenreduce.testing import check_reducer, prompts
from tokenreduce_plugins.vflowopt import VFlowOpt, foremost, maps

from .golden import GEOMETRY, Stored, assert_equal_floats, stored

ROWS = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.1, 0.7, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1]])


def attending(rows: Tensor) -> Stored:
    """A tile whose tokens attend to one another like that, in two heads."""
    view = stored(rows.expand(2, -1, -1), torch.arange(len(rows)))  # type: ignore[arg-type]
    return replace(view, queries=torch.empty(2, len(rows), 1), keys=torch.empty(2, len(rows), 1))


def test_importance_is_what_global_tokens_attend_to() -> None:
    """Received are .175, .55, .15 and .125: above 1.5 times their mean one token, above .65 times two, above 3 none."""
    assert_equal_floats(VFlowOpt(t=1.5).importance(attending(ROWS)), ROWS[1])
    assert_equal_floats(VFlowOpt(t=0.65).importance(attending(ROWS)), ROWS[:2].mean(0))
    assert_equal_floats(VFlowOpt(t=3.0).importance(attending(ROWS)), ROWS[1])


IMPORTANCE = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.3, 0.05, 0.7, 0.6, 0.15, 0.12, 0.5, 0.4, 0.02, 0.11, 0.45, 0.35])
SQUARE = (Tile(Grid(4, 4)),)


def selected(tiles: tuple[Tile, ...], importance: Tensor, **knobs: Any) -> Selection:
    """What is left of the features 0, 1, 2, ... of these tiles, whose tokens all attend to them by ``importance``."""
    reducer = VFlowOpt(**{"keeps": (0.5, 0.5, 0.5), "m": 2.0, **knobs})
    step, total = reducer.steps(GEOMETRY)[0], len(importance)
    sizes = [len(tile.grid) for tile in tiles]
    views = [attending(part.expand(len(part), -1)) for part in importance.split(sizes)]
    span = Span(GEOMETRY, tiles, total, total)
    tokens = VisualTokens(
        torch.arange(total)[:, None].float(),
        span,
        reducer.count(step, span),
        tile=torch.arange(len(tiles)).repeat_interleave(torch.tensor(sizes)),
        place=torch.cat([torch.arange(size) for size in sizes]),
        signals=lambda signal: views if signal in step.sees else [],
    )
    found = reducer.select(step, tokens)
    least, most = tokens.bounds or (0, 0)
    assert least <= len(found.index) <= most
    return found


def test_worked_example_of_merging() -> None:
    """Of 16 tokens 8 go and 4 make room for cells, so 12 are merged into 4."""
    found = selected(SQUARE, IMPORTANCE)
    assert found.index.tolist() == [0, 2, 3, 4, 6, 7, 8, 10]
    assert found.features is not None and found.values is not None
    expected = torch.tensor([0, 2, 3, 3.4444, 6, 7, 9.875, 12.3235])
    torch.testing.assert_close(found.features[:, 0], expected, atol=1e-4, rtol=0)
    assert found.values.equal(IMPORTANCE[found.index]), "a cell is as important as its most important token"
    assert found.sources(16).tolist() == [0, 3, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7, 6, 6, 7, 7]


def test_the_side_of_a_cell_need_not_be_whole() -> None:
    """By 1.5 the rows 0 and 1, 2, and 3 and 4 lie together; int(16 / 2.25) cells make room."""
    found = selected(SQUARE, IMPORTANCE, m=1.5)
    assert found.index.tolist()[0] == 0
    source = found.sources(16)
    assert source[4] == source[5] == source[1] != source[9]
    assert len({int(row) for row in source}) == len(found.index)


def test_cells_of_the_overview_and_of_the_crops_are_apart() -> None:
    crops = [Tile(Grid(2, 2), "crop", column=column) for column in (0, 2)]
    tiles = (Tile(Grid(2, 2), "thumbnail"), *crops)
    assert maps(Span(GEOMETRY, tiles, 12, 12)) == [(2, 2), (2, 4)]
    found = selected(tiles, torch.ones(12), m=3.0, keeps=(0.01, 1.0, 1.0))
    assert found.index.tolist() == [0, 4, 9], "the first of equals stands for its cell"
    assert found.sources(12).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 1, 2], "three columns of both crops, and one"


@pytest.mark.parametrize("tiles", [(*SQUARE, Tile(Grid(4, 4), picture=1)), (Tile(Grid(4, 4), "frame"),) * 2])
def test_several_images_and_videos_are_not_merged(tiles: tuple[Tile, ...]) -> None:
    importance = torch.cat([IMPORTANCE, IMPORTANCE / 2])
    found = selected(tiles, importance, keeps=(0.25, 1.0, 1.0))
    assert found.features is None
    assert found.index.tolist() == [0, 3, 6, 7, 10, 11, 14, 16]


def test_later_stages_drop_by_the_same_map() -> None:
    _, step, _ = (reducer := VFlowOpt(keeps=(0.5, 0.6, 0.5))).steps(GEOMETRY)
    span = Span(GEOMETRY, SQUARE, 5, 5)
    values, tile = torch.tensor([0.3, 0.1, 0.0, 0.2, 0.4]), torch.tensor([0, 0, -1, 0, 0])
    tokens = VisualTokens(torch.zeros(5, 1), span, reducer.count(step, span), tile=tile, values=values)
    assert reducer.select(step, tokens).index.tolist() == [0, 2, 4], "newlines come before others"


def test_the_foremost_of_every_group() -> None:
    scores, group = torch.tensor([1.0, 3, 2, 2, 3]), torch.tensor([1, 0, 1, 1, 0])
    assert foremost(scores, group, 2).tolist() == [1, 2]


@pytest.mark.parametrize(("name", "budget"), [("vflowopt_50", 0.5008), ("vflowopt_25", 0.2507), ("vflowopt_10", 0.1)])
def test_released_settings_have_their_budgets(name: str, budget: float) -> None:
    before, early, late = create(name).knobs()["keeps"]
    assert before * (9 + 9 * early + 10 * early * late) / 28 == pytest.approx(budget, abs=1e-4)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="give three shares and two layers"):
        VFlowOpt(keeps=(0.5, 0.5))
    with pytest.raises(TypeError, match="give a ratio"):
        VFlowOpt().with_keep(64)


def test_the_search_keeps_to_the_budget_and_takes_the_likest() -> None:
    tried: list[VFlowOpt] = []

    def state(sample: float, candidate: TokenReducer | None) -> Tensor:
        """Turned from the full one by as much as ``m`` is from what the samples want, and none with a large ``t``."""
        if candidate is None:
            return torch.tensor([1.0, 0.0])
        assert isinstance(candidate, VFlowOpt)
        tried.append(candidate)
        angle = torch.tensor((candidate.m - sample) / 21)
        return torch.stack([angle.cos(), angle.sin()]) * (torch.nan if candidate.t > 40 else 1)

    geometry = replace(GEOMETRY, decoder_layers=28)
    found = VFlowOpt().calibrated(state, [9.0, 11.0], geometry, budget=0.25, calls=40)
    assert len(tried) == 80
    for each in tried:
        before, early, late = each.keeps
        assert before * (9 + 9 * early + 10 * early * late) / 28 == pytest.approx(0.25, abs=1e-6)
        assert 0 <= each.t <= 50 and 3 <= each.m <= 24
    assert found == min((each for each in tried if each.t <= 40), key=lambda each: abs(each.m - 10))
    assert VFlowOpt().calibrated(state, [9.0, 11.0], geometry, budget=0.25, calls=40) == found, "seeded"
    with pytest.raises(ValueError, match="nothing to search: 0 samples"):
        VFlowOpt().calibrated(state, [], geometry, budget=0.25)


def test_the_search_is_handed_last_states(llava: LlavaForConditionalGeneration) -> None:
    handed: list[Tensor] = []

    class Listens(VFlowOpt):
        def calibrated(self, next_logits: Any, samples: Sequence[Any], geometry: Any, **settings: Any) -> VFlowOpt:
            handed.extend(next_logits(samples[0], candidate) for candidate in (None, self))
            return self

    inputs = prompts(llava)
    calibrate(llava, Listens(), [inputs])
    with torch.no_grad():
        full = llava.model(**inputs).last_hidden_state[0, -1]
        with reduce_tokens(llava, VFlowOpt()):
            reduced = llava(**inputs).logits[0, -1]
    assert handed[0].equal(full)
    torch.testing.assert_close(llava.lm_head(handed[1]), reduced)
    found = calibrate(llava, "vflowopt", [inputs], budget=0.5, calls=2)
    assert isinstance(found, VFlowOpt) and found != VFlowOpt()
    check_reducer(found, llava, prompts(llava, [1, 2]))
