"""How many tokens there are after every step, before anything is computed, is what a model then finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import reduce_tokens
from tokenreduce.budget import Budget, Currency, solve
from tokenreduce.counts import AdaptiveError, Layout, entering, layer_counts
from tokenreduce.evaluation.costs import layout, within_budget
from tokenreduce.models.family import family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import (
    AtDecoder,
    AtInput,
    AtProjector,
    Count,
    Geometry,
    Grid,
    Keep,
    Scope,
    Selection,
    Span,
    Step,
    Tile,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.registry import MODELS
from tokenreduce.signals import QuestionEmbeddings
from tokenreduce.testing import prompts
from tokenreduce.testing.checkpoints import ask, picture, recipes, video

GEOMETRY = Geometry(encoder_layers=4, decoder_layers=4, feature_layer=2, class_token=False)
PICTURE = (Tile(Grid(4, 4), "thumbnail"), Tile(Grid(4, 5), "crop"), Tile(Grid(2, 7), "crop"))
TWO = (*PICTURE, Tile(Grid(5, 5), picture=1))
SCOPES: tuple[Scope, ...] = ("tile", "picture", "sample")


@dataclass(frozen=True)
class Steps(TokenReducer):
    """Keeps the first tokens at every step that it is given, and half of them at those that are adaptive."""

    given: tuple[Step, ...] = ()
    adaptive: Callable[[Span], Count] | None = None

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return self.given

    def count(self, step: Step, span: Span) -> Count:
        return self.adaptive(span) if step.keep is None and self.adaptive else super().count(step, span)

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(len(tokens) // 2 if tokens.adaptive else tokens.keep))


def belongs(scope: Scope, tiles: Sequence[Tile]) -> list[int]:
    """To which of a scope's groups every tile belongs."""
    return [{"tile": number, "picture": tile.picture, "sample": 0}[scope] for number, tile in enumerate(tiles)]


@pytest.mark.parametrize("inside", SCOPES)
@pytest.mark.parametrize("before", SCOPES)
@pytest.mark.parametrize("name", [name for name, recipe in recipes().items() if recipe.frames or "next" in name])
def test_counts_are_what_a_model_finds(
    checkpoint: Callable[[str], Path], name: str, before: Scope, inside: Scope
) -> None:
    """Unless how many tokens of its part there are is what a wider step decided."""
    model, processor = load(str(checkpoint(name)))
    family = family_of(model, MODELS.usable())
    batches = [ask(processor, [[picture(0, 30, 90)]]), ask(processor, [[picture(0, 30, 90), picture(1, 50, 50)]])]
    if recipes()[name].frames:
        batches.append(ask(processor, [[]], [[video(0, 4, 40, 60)]]))
    reducer = Steps(given=(AtProjector(keep=0.6, scope=before), AtDecoder(layer=2, keep=0.5, scope=inside)))
    for batch in batches:
        prompt = layout(family, batch)
        if prompt.special:
            continue  # counted whole, though a line that goes takes its own along
        with reduce_tokens(model, reducer) as attachment, torch.no_grad():
            model(**batch)
        (sample,) = attachment.samples
        found = tuple(length - prompt.text for length in sample.lengths)
        assert entering(reducer, family.geometry, prompt) == found[0]
        wide, narrow = (belongs(scope, prompt.tiles) for scope in (before, inside))
        if len({*zip(wide, narrow, strict=True)}) > len({*wide}) and inside != "sample":
            with pytest.raises(AdaptiveError):
                layer_counts(reducer, family.geometry, prompt)
        else:
            assert layer_counts(reducer, family.geometry, prompt) == found


def test_special_tokens_are_tokens_like_any_other_inside_the_language_model() -> None:
    """Unless a step sees tiles, which they are not of; and whose they are is known of the only picture alone."""
    one, two = Layout(PICTURE, special=6), Layout(TWO, special=8)

    def counted(scope: Scope, prompt: Layout) -> tuple[int, ...]:
        return layer_counts(Steps(given=(AtDecoder(layer=2, keep=0.5, scope=scope),)), GEOMETRY, prompt)

    assert counted("sample", one) == counted("picture", one) == (56, 56, 28, 28)
    assert counted("tile", one) == (56, 56, 8 + 10 + 7 + 6, 31)
    assert counted("sample", two) == (83, 83, 41, 41)
    assert counted("tile", two) == (83, 83, 25 + 12 + 8, 45)
    with pytest.raises(AdaptiveError):
        counted("picture", two)
    assert counted("picture", Layout(TWO)) == (75, 75, 25 + 12, 37)


def test_what_a_joint_step_leaves_of_each_part_is_not_known() -> None:
    wide, narrow = AtProjector(keep=0.5, scope="sample"), AtProjector(scope="picture", keep=0.5)
    assert entering(Steps(given=(narrow, wide)), GEOMETRY, Layout(TWO)) == 37
    most = Steps(given=(wide, replace(narrow, keep=None)), adaptive=lambda span: min(span.current, 5))
    with pytest.raises(AdaptiveError):
        entering(most, GEOMETRY, Layout(TWO))
    assert entering(Steps(given=(wide, replace(narrow, keep=5))), GEOMETRY, Layout(TWO)) == 10, "or it is refused"


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (None, lambda span: 30, 30),
        ((20, 50), lambda span: min(span.current, 15), 15),
        ((20, 50), lambda span: min(span.current, 30), None),
        ((40, 40), lambda span: span.current // 2, 20),
        (None, lambda span: min(span.current, 30), None),
        (None, lambda span: (30, 30), 30),
        (None, lambda span: (30, 31), None),
    ],
)
def test_a_range_matters_where_it_is_left_in_the_end(first: Any, last: Any, expected: int | None) -> None:
    steps = (AtProjector(scope="sample"), AtProjector(scope="sample", member=1))
    reducer = Chained(given=steps, counts=(lambda span: first, last))
    if expected is not None:
        assert layer_counts(reducer, GEOMETRY, Layout(PICTURE)) == (expected,) * 4
        return
    with pytest.raises(AdaptiveError, match="Chained decides by the picture how many tokens it keeps"):
        entering(reducer, GEOMETRY, Layout(PICTURE))


@dataclass(frozen=True)
class Chained(Steps):
    """Another count for each member."""

    counts: tuple[Callable[[Span], Count], ...] = ()

    def count(self, step: Step, span: Span) -> Count:
        return self.counts[step.member](span)


# Budgets.


@dataclass(frozen=True)
class Adaptive(TokenReducer):
    """Keeps the tokens of more than a share of the greatest length."""

    keep: Keep = 0.5
    layer: int = 0
    ranged: bool = False
    asks: bool = False

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        sees = (QuestionEmbeddings(),) if self.asks else ()
        return [AtDecoder(layer=self.layer, sees=sees) if self.layer else AtProjector(sees=sees)]

    def count(self, step: Step, span: Span) -> Count:
        return (1, span.current) if self.ranged else None

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        for signal in step.sees:
            assert tokens[signal].ndim == 2
        lengths = tokens.features.float().norm(dim=-1)
        kept = lengths.argsort(descending=True)[: max(1, int((lengths > (1 - self.keep) * lengths.max()).sum()))]
        return Selection(kept.sort().values)


@pytest.mark.parametrize("ranged", [True, False])
@pytest.mark.parametrize(("layer", "currency"), [(0, "tokens"), (0, "layer_mean"), (2, "layer_mean"), (2, "flops")])
def test_an_adaptive_method_is_held_to_a_budget_by_running_it(
    llava: Model, layer: int, currency: Currency, ranged: bool
) -> None:
    samples = [prompts(llava, [1], seed) for seed in range(3)]
    reducer, budget = Adaptive(layer=layer, ranged=ranged), Budget(currency, 0.8)
    solution = within_budget(llava, reducer, budget, samples)
    spent = []
    for sample in samples:
        with reduce_tokens(llava, solution.reducer) as attachment, torch.no_grad():
            llava(**sample)
        (done,) = attachment.samples
        spent.append([length - done.lengths[0] + done.entering for length in done.lengths])
    mean = sum(map(sum, spent)) / sum(map(len, spent))
    if currency != "flops":
        assert solution.expected == pytest.approx(mean if currency == "layer_mean" else sum(n[0] for n in spent) / 3)
    assert solution.expected == pytest.approx(0.8 * solution.whole, rel=0.05)
    assert 0 < solution.reducer.knobs()["keep"] < 1


def test_one_that_reads_the_question_is_told_it(checkpoint: Callable[[str], Path]) -> None:
    model, processor = load(str(checkpoint("llava")))
    samples = [ask(processor, [[picture(seed, 40, 40)]]) for seed in range(2)]
    with pytest.raises(ValueError, match="pass processor="):
        within_budget(model, Adaptive(asks=True), Budget("tokens", 0.8), samples)
    questions = ["what colour is it", "how many are there"]
    solution = within_budget(model, Adaptive(asks=True), Budget("tokens", 0.8), samples, questions, processor)
    assert solution.expected == pytest.approx(0.8 * solution.whole, rel=0.1)


def test_tokens_that_enter_are_known_though_a_later_step_is_adaptive(llava: Model) -> None:
    """So that such a budget is solved on counts alone, and any other by running the method."""
    reducer = Kept(given=(AtProjector(), AtDecoder(layer=2)), adaptive=lambda span: (1, span.current))
    prompt, config = Layout((Tile(Grid(6, 6)),), text=9), llava.config.text_config

    def measure(candidate: TokenReducer) -> list[list[int]]:
        raise AssertionError("this need not be run")

    geometry = family_of(llava, MODELS.usable()).geometry
    solution = solve(reducer, Budget("tokens", 9), geometry, [prompt], config, measure)
    assert (solution.reducer.knobs()["keep"], solution.expected) == (9, 9)
    with pytest.raises(AdaptiveError):
        solve(reducer, Budget("layer_mean", 9), geometry, [prompt], config)


@dataclass(frozen=True)
class Kept(Steps):
    """Keeps so many at the projector, and whatever comes out of it inside."""

    keep: Keep = 0.5

    def count(self, step: Step, span: Span) -> Count:
        return span.keep(self.keep) if isinstance(step, AtProjector) else super().count(step, span)


def test_a_step_at_the_input_counts_in_a_chain_of_scopes() -> None:
    """Its smaller grids are what a later step counts of."""
    steps = (AtInput(keep=0.25), AtProjector(keep=0.5, scope="sample"))
    assert entering(Steps(given=steps), GEOMETRY, Layout((Tile(Grid(4, 4)), Tile(Grid(6, 6), picture=1)))) == 6
