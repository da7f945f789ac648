"""CATP prunes demonstrations by their texts and the question, and the question's picture by what is left of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.counts import Layout, layer_counts
from tokenreduce.reducer import Grid, Span, Tile, VisualTokens
from tokenreduce.signals import DecoderHidden
from tokenreduce.testing import prompts
from tokenreduce_plugins.catp import Catp, covering

from .golden import GEOMETRY, stored

TOKENS = normalize(torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]]), dim=-1)
TEXT = torch.tensor([[1, 0.5]])


def test_worked_example_before_the_language_model() -> None:
    """Of each pair the token that is nearer to the text: first 3.840 of 3.715, 3.840, 3.559, 3.702, then 5.212."""
    likeness = (1 + TOKENS @ TOKENS.T) / 2
    fits = 0.7 * (1 + cosine_similarity(TOKENS, TEXT, dim=-1)) / 2
    expected = torch.tensor([3.715, 3.840, 3.559, 3.702])
    torch.testing.assert_close(likeness.sum(0) + fits, expected, atol=1e-3, rtol=0)
    second = torch.maximum(likeness[:, 1], likeness[:, 3]).sum() + fits[1] + fits[3]
    torch.testing.assert_close(second, torch.tensor(5.212), atol=1e-3, rtol=0)
    assert covering(TOKENS, TEXT, 2, weight=0.7).tolist() == [1, 3]
    far = covering(TOKENS, torch.cat([TEXT, torch.tensor([[-1.0, -9.0]])]), 2, weight=50.0)
    assert far.tolist() == [0, 1], "the mean of the text, and by its weight"
    assert len(covering(TOKENS, TEXT[:0], 2, weight=0.7)) == 2, "a picture without text"


def inside(stage: int, keep: int, before: Tensor, now: Tensor, hidden: Tensor, tiles: list[int]) -> list[int]:
    """What a step inside the language model keeps of pictures of so many tokens each, text 1 token before them and 1
    behind, and a special token behind the first; ``before`` and ``now`` are what the last token attends to."""
    (_, *steps), total = Catp(layer=6).steps(GEOMETRY), sum(tiles)
    step = steps[stage - 1]
    span = Span(GEOMETRY, tuple(Tile(Grid(1, size), picture=n) for n, size in enumerate(tiles)), total + 1, total + 1)
    tile = torch.cat([torch.full((tiles[0],), 0), torch.tensor([-1]), *(torch.full((n,), 1) for n in tiles[1:])])

    def look(signal: Any) -> list[Any]:
        if signal == DecoderHidden():
            return [hidden]
        row = (before if signal == step.sees[0] and stage == 1 else now).expand(2, len(hidden), -1)
        return [stored(row, torch.arange(1, total + 2), text=torch.tensor([total + 2]))]  # type: ignore[arg-type]

    return Catp(layer=6).select(step, VisualTokens(hidden[1:-1], span, keep, tile=tile, signals=look)).index.tolist()


def at(cosines: list[float]) -> Tensor:
    """Unit vectors of two dimensions that have these cosines with the first axis."""
    values = torch.tensor(cosines)
    return torch.stack([values, (1 - values.square()).sqrt()], dim=1)


def test_worked_example_inside_the_language_model() -> None:
    """Rises of .08, 0 and .01 and likenesses of .2, .6 and .1 make .20, .36 and .07: the third goes first."""
    hidden = at([1, 0.2, 0.6, 0.1, -1, 1, 1])
    now, before = torch.tensor([0, 0.10, 0.04, 0.02, 0, 0, 0.84]), torch.tensor([0, 0.02, 0.06, 0.01, 0, 0, 0.91])
    assert inside(1, 4, before, now, hidden, [3, 1]) == [0, 1, 3, 4], "neither special tokens nor the question's go"
    assert inside(1, 3, before, now, hidden, [3, 1]) == [1, 3, 4]
    rise = torch.tensor([0, 0.50, 0.04, 0.02, 0, 0, 0.44])
    assert inside(1, 3, before, rise, hidden, [3, 1]) == [0, 3, 4]


def test_the_questions_picture_is_pruned_by_what_is_before_it() -> None:
    hidden = at([0, 1, 1, 0.3, 0.9, 0.1, 0.8, -1])
    none = torch.zeros(8)
    assert inside(2, 5, none, none, hidden, [2, 3]) == [0, 1, 2, 3, 5]
    assert inside(2, 4, none, none, hidden, [2, 3]) == [0, 1, 2, 3]


def test_counts() -> None:
    """Of 576 tokens 383 enter and 191 are left; the two demonstrations' 240 and 900 tokens are pruned together."""
    shots = Layout((Tile(Grid(12, 20)), Tile(Grid(30, 30), picture=1), Tile(Grid(24, 24), picture=2)), text=64)
    one = Layout((Tile(Grid(24, 24)),), text=64)
    assert layer_counts(create("catp_r67", layer=6), GEOMETRY, one) == (383,) * 8 + (191,) * 24
    context, halfway = int(1140 * 0.333), int(240 * 1.333 / 2) + int(900 * 1.333 / 2)
    expected = (halfway + 383,) * 7 + (context + 383,) + (context + 191,) * 24
    assert layer_counts(create("catp_r67", layer=6), GEOMETRY, shots) == expected
    assert layer_counts(create("catp", keep=100, layer=6), GEOMETRY, shots)[::31] == (170 + 500 + 338, 300)
    assert layer_counts(create("catp", keep=1.0), GEOMETRY, shots) == (1716,) * 32


def test_demonstrations_are_ranked_together(llava: LlavaForConditionalGeneration) -> None:
    with reduce_tokens(llava, "catp", keep=0.5) as attachment, torch.no_grad():
        llava(**prompts(llava, [4, 1]))
    several, alone = attachment.samples
    *context, last = [[len(step.index) for step in image.steps] for image in several.images]
    assert [counts[0] for counts in context] == [27] * 3
    assert sum(counts[1] for counts in context) == 54
    assert {counts[1] for counts in context} != {18}, "some lose more"
    assert last == [27, 27, 18]
    assert [len(step.index) for step in alone.images[0].steps] == [27, 27, 18]


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_a_layer_without_room_around_it_is_refused(llava: LlavaForConditionalGeneration, layer: int) -> None:
    refused = pytest.raises(ValueError, match=r"drops tokens before the second behind it, so give 1\.\.1")
    with refused, reduce_tokens(llava, "catp", layer=layer):
        pass
