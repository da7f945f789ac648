"""YOPO's masks are those of its text, written out in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import Grid, Span, Step, Tile, VisualTokens
from tokenreduce.testing import prompts, tiny_llava
from tokenreduce_plugins.yopo import Yopo

from .golden import GEOMETRY, stored


def sight(reducer: Yopo, step: Step, tiles: tuple[Tile, ...], special: tuple[int, ...] = ()) -> Tensor:
    """Who may attend to whom with two tokens of text before the visual ones and three behind."""
    tile = [number for number, each in enumerate(tiles) for _ in range(len(each.grid))]
    place = [place for each in tiles for place in range(len(each.grid))]
    for slot in special:
        tile.insert(slot, -1)
        place.insert(slot, -1)
    count = len(tile)
    view = stored(
        torch.empty(0),
        slice(2, 2 + count),
        text=torch.arange(2 + count, 5 + count),
        keys=torch.empty(1, 5 + count, 1),
    )
    span = Span(GEOMETRY, tiles, count, count)
    tokens = VisualTokens(
        torch.zeros(count, 3),
        span,
        reducer.count(step, span),
        tile=torch.tensor(tile),
        place=torch.tensor(place),
        signals=lambda signal: [view],
    )
    selection = reducer.select(step, tokens)
    assert selection.index.tolist() == list(range(count)) and selection.sight is not None
    return selection.sight


def test_worked_example() -> None:
    reducer = Yopo(radius=1)
    found = sight(reducer, reducer.steps(GEOMETRY)[0], (Tile(Grid(4, 4)),))
    assert (found[2] > 0).nonzero()[:, 0].tolist() == [2, 3, 6, 7]  # (0, 0) reads (0, 0), (0, 1), (1, 0), (1, 1)
    assert int((found[2] < 0).sum()) == 12
    assert int((found[2 + 5] > 0).sum()) == 9  # an interior token
    text = [0, 1, 18, 19, 20]
    assert not found[text].any() and not found[:, text].any()


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_neighbours_are_within_a_tile(radius: int) -> None:
    tiles = (Tile(Grid(3, 4)), Tile(Grid(2, 5), role="crop", column=4))
    reducer = Yopo(radius=radius)
    found = sight(reducer, reducer.steps(GEOMETRY)[0], tiles, special=(12,))
    where = [(0, place // 4, place % 4) for place in range(12)] + [(-1, 0, 0)]
    where += [(1, place // 5, place % 5) for place in range(10)]
    expected = torch.zeros(28, 28, dtype=torch.int8)
    for one, (tile, row, column) in enumerate(where):
        for other, (its, r, c) in enumerate(where):
            if tile >= 0 and its >= 0:
                near = tile == its and abs(row - r) <= radius and abs(column - c) <= radius
                expected[2 + one, 2 + other] = 1 if near else -1
    assert found.equal(expected)


def test_from_the_cut_on_text_sees_no_picture() -> None:
    reducer = Yopo(cut=24)
    near, cut = reducer.steps(GEOMETRY)
    assert [step.decoder_layer(GEOMETRY) for step in (near, cut)] == [1, 24]
    (alone,) = Yopo(radius=None, cut=24).steps(GEOMETRY)
    assert alone == cut
    found = sight(reducer, cut, (Tile(Grid(2, 2)),))
    assert (found < 0).nonzero().tolist() == [[text, visual] for text in (0, 1, 6, 7, 8) for visual in (2, 3, 4, 5)]
    assert not (found > 0).any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cut_alone_is_the_withdrawal_of_all_visual_tokens(attention: str) -> None:
    model = tiny_llava(attention=attention)
    inputs = prompts(model, [1, 3, 0])
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for more in ({}, {"num_beams": 2}):
        with reduce_tokens(model, Yopo(radius=None, cut=2)):
            hidden = model.generate(**inputs, **options, **more)
        with reduce_tokens(model, create("vtw", layer=2)):
            gone = model.generate(**inputs, **options, **more)
        assert hidden.sequences.equal(gone.sequences)
        torch.testing.assert_close(torch.stack(hidden.logits), torch.stack(gone.logits), atol=1e-5, rtol=1e-4)


def test_nothing_is_saved(llava: LlavaForConditionalGeneration) -> None:
    with reduce_tokens(llava, Yopo()) as reduction:
        llava(**prompts(llava))
    assert len({*reduction.samples[0].lengths}) == 1


def test_a_radius_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="radius=-1"):
        Yopo(radius=-1)
