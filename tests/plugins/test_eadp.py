"""EADP keeps what the official code keeps, on LLaVA by CLIP's text tower and on Qwen by the model's own embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import Grid, Selection, Span, Tile, VisualTokens
from tokenreduce.signals import Clip
from tokenreduce.testing import prompts
from tokenreduce.testing.processors import tiny_processor
from tokenreduce_plugins.eadp import Eadp, covering, smoothed

from .golden import GEOMETRY, Case, assert_equal_floats, cases


def tiles(number: int, grid: Grid) -> tuple[Tile, ...]:
    """So many of one picture, in a row."""
    return tuple(Tile(grid, "crop" if number > 1 else "whole", column=place * grid.width) for place in range(number))


def shown(reducer: Eadp, features: Tensor, grid: Grid, values: Sequence[Any]) -> VisualTokens:
    """The tokens of a picture of one or several tiles, and what the signal gives: a value for each, or one for all."""
    (step,) = reducer.steps(GEOMETRY)
    span = Span(GEOMETRY, tiles(len(features) // len(grid), grid), len(features), len(features))
    number = torch.arange(len(span.tiles)).repeat_interleave(len(grid))
    return VisualTokens(
        features,
        span,
        reducer.count(step, span),
        tile=number,
        place=torch.arange(len(grid)).repeat(len(span.tiles)),
        signals=lambda signal: values if signal in step.sees else [],
    )


def reduced(reducer: Eadp, tokens: VisualTokens) -> tuple[Tensor, Selection]:
    """What each token weighs, and the selection."""
    (step,) = reducer.steps(GEOMETRY)
    places = [(tokens.tile == number).nonzero()[:, 0] for number in range(len(tokens.span.tiles))]
    return reducer.importance(step, tokens, places), reducer.select(step, tokens)


def of_qwen(case: Case, **knobs: Any) -> tuple[Eadp, VisualTokens]:
    settings = case.settings
    reducer = replace(Eadp(settings["k"], clip=None, alpha=settings["alpha"], beta=settings["beta"]), **knobs)
    grid = Grid(settings["rows"], settings["cols"])
    return reducer, shown(reducer, case.given["x"], grid, [case.given["text"]])


def of_llava(case: Case, **knobs: Any) -> tuple[Eadp, VisualTokens]:
    settings, given = case.settings, case.given
    reducer = replace(Eadp(settings["T"] * settings["tiles"], alpha=settings["alpha"], beta=settings["beta"]), **knobs)
    side = round(settings["N"] ** 0.5)
    spaces = [Clip(image, given["clip_text"], torch.empty(0), given["clip_text_seq"]) for image in given["clip_image"]]
    return reducer, shown(reducer, given["x"].flatten(0, 1), Grid(side, side), spaces)


@pytest.mark.parametrize("case", cases("eadp"))
def test_official_vectors(case: Case) -> None:
    reducer, tokens = of_qwen(case)
    importance, selection = reduced(reducer, tokens)
    assert_equal_floats(importance, case.expected["importance"])
    assert covering(tokens.features, importance, tokens.keep).equal(case.expected["pick_order"])
    assert selection.index.equal(case.expected["kept"])


@pytest.mark.parametrize("case", cases("eadp_llava"))
def test_official_vectors_of_llava(case: Case) -> None:
    reducer, tokens = of_llava(case)
    importance, selection = reduced(reducer, tokens)
    assert_equal_floats(importance, case.expected["importance"].flatten())
    per_tile, size = case.expected["per_tile"].tolist(), case.settings["N"]
    official = [part + number * size for number, part in enumerate(case.expected["kept_concat"].split(per_tile))]
    assert selection.index.equal(torch.cat(official))
    least, most = tokens.bounds or (0, 0)
    assert least <= sum(per_tile) <= most


@pytest.mark.parametrize("case", cases("eadp"))
@pytest.mark.parametrize(
    "knobs", [{"alpha": 0.7}, {"beta": 1.5}, {"entropy_keep_ratio": 0.5}], ids=lambda knobs: next(iter(knobs))
)
def test_mistaken_settings_are_noticed(case: Case, knobs: dict[str, Any]) -> None:
    """A ratio of .5 is the official function's own default, which no caller leaves as it is."""
    importance, _ = reduced(*of_qwen(case, **knobs))
    assert (importance - case.expected["importance"]).abs().max() > 1e-2


def test_the_choice_of_words_is_each_tiles_own_and_the_scale_is_the_pictures() -> None:
    """Read jointly throughout, the tiles of case 2 keep 36 tokens and not 37."""
    reducer, tokens = of_llava(cases("eadp_llava")[2].values[0])
    importance, selection = reduced(reducer, tokens)
    assert len(selection.index) == 37
    (step,) = reducer.steps(GEOMETRY)
    spaces = tokens.each(step.sees[0])
    joint = Clip(torch.cat([each.patches for each in spaces]), spaces[0].text, torch.empty(0), spaces[0].segments)
    together = shown(reducer, tokens.features, Grid(7, 7), [joint])
    wrong, kept = reduced(reducer, together)
    assert (wrong - importance).abs().max() > 0.1
    assert len(kept.index) == 36


ANGLES = torch.tensor([0.0, 8, 30, 95, 110, 170, 205, 260, 311]).deg2rad()
WORKED = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
WORDS = torch.tensor([[1, 0], [-0.5, 0.9], [0.3, 0.3], [0, -1], [0.2, 0.9]])


def test_worked_example() -> None:
    """Nine directions, five words of which one tells: the least like the question weigh most."""
    reducer = Eadp(4, clip=None)
    importance, selection = reduced(reducer, shown(reducer, WORKED, Grid(3, 3), [WORDS]))
    expected = torch.tensor([0.1081, 0.1752, 0.2221, 0.3346, 0.3749, 0.4088, 0.4615, 0.5189, 0.5708])
    torch.testing.assert_close(importance, expected, atol=1e-4, rtol=0)
    assert covering(WORKED, importance, 4).tolist() == [6, 2, 4, 8]
    assert selection.index.tolist() == [2, 4, 6, 8]


def test_a_line_of_tokens_and_a_tile_that_lost_some_are_not_smoothed() -> None:
    values = torch.tensor([0.0, 0, 1, 0])
    assert smoothed(values, Grid(1, 4)).equal(values)
    assert smoothed(values, Grid(3, 2)).equal(values)
    # The Gaussian of one token gives 0.4519 to the middle and 0.2741 to either side; mirroring counts the other twice.
    across, along = torch.tensor([2 * 0.2741, 0.4519]), torch.tensor([2 * 0.2741, 0.4519])
    torch.testing.assert_close(
        smoothed(values, Grid(2, 2)), (across[:, None] * along.flip(0)).flatten(), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(("keep", "left"), [(1, {2}), (9, {7, 8, 9}), (18, {16, 17, 18})])
def test_every_tile_keeps_one_at_least(keep: int, left: set[int]) -> None:
    reducer = Eadp(keep, clip="any")
    space = Clip(WORKED, WORDS[:1], torch.empty(0), WORDS[None])
    tokens = shown(reducer, WORKED.repeat(2, 1), Grid(3, 3), [space, space])
    _, selection = reduced(reducer, tokens)
    assert tokens.bounds == (1, min(keep + 1, 18))
    assert len(selection.index) in left
    assert {int(place) // 9 for place in selection.index} == {0, 1}


@pytest.mark.parametrize("own", [True, False], ids=["own embeddings", "clip"])
def test_the_question_decides(llava: LlavaForConditionalGeneration, clip: Path, own: bool) -> None:
    questions = "what colour is the square ?", "how many are there ?"
    processor = tiny_processor(llava, [word for question in questions for word in question.split()])
    reducer = create("eadp", keep=6, clip=None if own else str(clip))

    def kept(question: str) -> list[tuple[int, ...]]:
        with reduce_tokens(llava, reducer, question=question, processor=processor) as attachment, torch.no_grad():
            llava(**prompts(llava, [2, 1]))
        return [tuple(image.kept) for sample in attachment.samples for image in sample.images]

    first, second = map(kept, questions)
    assert {len(each) for each in first} == {6}
    assert first != second
