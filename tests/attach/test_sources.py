"""What is noted of a sample with several pictures: tiles, rows and tokens are counted the same way everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import available, create, reduce_tokens
from tokenreduce.attach import SampleReduction, StepReduction
from tokenreduce.models.family import family_of
from tokenreduce.reducer import AtDecoder, AtProjector, Geometry, Selection, Span, Step, TokenReducer, VisualTokens
from tokenreduce.registry import MODELS
from tokenreduce.testing import prompts
from tokenreduce.testing.processors import tiny_processor

REDUCERS = [name for name in available("reducers") if name != "chain"]
CHAINS = {
    "fopru, fastv": create("chain", reducers=({"name": "fopru_rank", "keep": 0.5}, {"name": "fastv", "keep": 0.5})),
    "visionzip, sparsevlm": create("chain", reducers=({"name": "visionzip", "keep": 0.7}, {"name": "sparsevlm"})),
    "tome, dart": create("chain", reducers=({"name": "tome", "keep": 0.7}, {"name": "dart", "keep": 0.5})),
    "pool, pyramiddrop": create("chain", reducers=({"name": "pool"}, {"name": "pyramiddrop"})),
}


@dataclass(frozen=True)
class AcrossPictures(TokenReducer):
    """Of the 72 tokens of two pictures keeps three, into which all others go: 30, then 30, then 12."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtDecoder(layer=1)]

    def count(self, step: Step, span: Span) -> int:
        return 3

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        index, source = torch.tensor([0, 40, 71]), torch.arange(72) // 30
        rows = torch.stack([tokens.features[source == row].mean(0) for row in range(3)])
        return Selection(index, rows, source)


@dataclass(frozen=True)
class AcrossPicturesTwice(TokenReducer):
    """15 tokens of every picture at the projector; inside, twice, every other row goes into its left neighbour, which
    may be of the picture before."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(keep=15), AtDecoder(layer=1), AtDecoder(layer=2)]

    def count(self, step: Step, span: Span) -> int:
        return 15 if isinstance(step, AtProjector) else (span.current + 1) // 2

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        if isinstance(step, AtProjector):
            return Selection(torch.arange(15) * 2 + 1)
        index, source = torch.arange(0, len(tokens), 2), torch.arange(len(tokens)) // 2
        return Selection(index, tokens.features[index], source)


def test_merging_across_pictures(llava: Model) -> None:
    with reduce_tokens(llava, AcrossPictures()) as attachment, torch.no_grad():
        llava(**prompts(llava, [2]))
    first, second = (image.steps[-1] for image in attachment.samples[0].images)
    assert first.index == (0,)
    assert first.source == (0,) * 36
    assert first.into == (0,) * 30 + (1,) * 6
    assert second.index == (4, 35)
    assert second.source == (0,) * 24 + (1,) * 12
    assert second.into == ()


def test_merging_across_pictures_twice(llava: Model) -> None:
    """15, 15 and 15 tokens enter; 23 rows are left of them, and then 12."""
    with reduce_tokens(llava, AcrossPicturesTwice()) as attachment, torch.no_grad():
        llava(**prompts(llava, [3]))
    (sample,) = attachment.samples
    consistent(sample)
    for number, image in enumerate(sample.images):
        _, once, twice = image.steps
        for step, group in ((once, 2), (twice, 4)):
            for token in range(36):
                if token % 2 == 0 or token >= 30:
                    assert step.source[token] == -1
                    continue
                row = (15 * number + token // 2) // group
                home = row * group // 15  # the tile of the token that the row stands for
                before = -(-15 * home // group)  # the rows of the tiles before that
                assert (_into(step, number)[token], step.source[token]) == (home, row - before)


@pytest.mark.parametrize("name", REDUCERS)
def test_every_reducers_notes_hold_together(llava: Model, made: Callable[[str], TokenReducer], name: str) -> None:
    processor = tiny_processor(llava, ["what", "is", "it"])
    with (
        reduce_tokens(llava, made(name), question="what is it", processor=processor) as attachment,
        torch.no_grad(),
    ):
        llava(**prompts(llava, [1, 3, 0, 2]))
    for sample in attachment.samples:
        consistent(sample, elsewhere=name == "apet")
        _lengths_are_those_of_the_notes(sample)


@pytest.mark.parametrize("name", CHAINS)
def test_every_chains_notes_hold_together(llava: Model, name: str) -> None:
    with reduce_tokens(llava, CHAINS[name]) as attachment:
        llava.generate(**prompts(llava, [1, 3, 0, 2]), do_sample=False, max_new_tokens=2)
    for sample in attachment.samples:
        consistent(sample)
        _lengths_are_those_of_the_notes(sample)


@pytest.mark.parametrize("name", ["fopru_rank", "visionzip", "tome", "fastv", "pyramiddrop", "sparsevlm", "vtw"])
def test_notes_hold_together_on_every_family(family: Any, name: str) -> None:
    steps = create(name).steps(family_of(family.model, MODELS.usable()).geometry)
    if not {type(step) for step in steps} <= set(family.sites):
        pytest.skip(f"{family.name} cannot host {name}")
    with reduce_tokens(family.model, name) as attachment, torch.no_grad():
        family.model(**family.batch)
    assert any(len(sample.images) > 1 for sample in attachment.samples)
    for sample in attachment.samples:
        consistent(sample)


def consistent(sample: SampleReduction, elsewhere: bool = False) -> None:
    """Check the notes of one sample, step by step.

    A token that a row stands for is in that row of its own tile; every token's row is one that there is, or one of a
    special token's (a newline), which is in no tile; what is gone stays gone. ``elsewhere`` where rows stand at the
    places of other tokens, whose own rows are gone.
    """
    (depth,) = {len(image.steps) for image in sample.images} or {0}
    for number, image in enumerate(sample.images):
        gone: set[int] = set()
        for place in range(depth):
            step = image.steps[place]
            into = _into(step, number)
            assert len(step.source) == len(into) == len(image.grid)
            for row, token in enumerate(step.index):
                if token >= 0 and not elsewhere:
                    assert (into[token], step.source[token]) == (number, row)
            for tile, row in zip(into, step.source, strict=True):
                assert row == -1 or tile == -1 or 0 <= row < len(sample.images[tile].steps[place].index)
            assert all(step.source[token] == -1 for token in gone)
            gone = {token for token, row in enumerate(step.source) if row == -1}
            assert elsewhere or not gone & set(step.index)


def _into(step: StepReduction, own: int) -> Sequence[int]:
    """The tile that each token's row is in."""
    return step.into or (own,) * len(step.source)


def _lengths_are_those_of_the_notes(sample: SampleReduction) -> None:
    """In a model without special visual tokens: as many as rows are noted, and the text."""
    text = sample.lengths[0] - sample.entering
    for place in range(len(sample.images[0].steps) if sample.images else 0):
        site = sample.images[0].steps[place].site
        if site.startswith("decoder layer"):
            layer = int(site.split()[-1])
            rows = sum(len(image.steps[place].index) for image in sample.images)
            assert sample.lengths[layer] == rows + text
