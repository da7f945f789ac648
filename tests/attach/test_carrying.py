"""What a step carries is there at the method's next step, also where that is inside the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import create, reduce_tokens
from tokenreduce.budget import Budget, solve
from tokenreduce.counts import AdaptiveError, Layout, layer_counts
from tokenreduce.reducer import (
    AtDecoder,
    AtEncoderOutput,
    AtProjector,
    Geometry,
    Grid,
    Keep,
    Selection,
    Step,
    Tile,
    TokenReducer,
    VisualTokens,
)
from tokenreduce.testing import prompts
from tokenreduce.testing.wrapping import Wrapped

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}
LLAVA = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
SQUARE = Layout((Tile(Grid(24, 24)),), text=64)


@dataclass(frozen=True)
class Carries(TokenReducer):
    """Carries a number that tells one picture from another through two steps before the language model and two in it,
    and writes down what it finds."""

    keep: Keep = 0.5
    silent: bool = False
    log: list[Any] = field(default_factory=list)

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [
            AtEncoderOutput(keep=1.0),
            AtProjector(keep=self.keep),
            AtDecoder(layer=1, keep=0.25),
            AtDecoder(layer=3, keep=0.1),
        ]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        self.log.append((type(step), getattr(step, "layer", None), tokens.carried))
        if isinstance(step, AtEncoderOutput):
            carry: Any = float(tokens.features.sum())
        elif isinstance(step, AtProjector):
            carry = None if self.silent else tokens.carried
        else:
            carry = ["inside", tokens.carried]
        return Selection(torch.arange(tokens.keep), carry=carry)

    def found(self, layer: int) -> list[Any]:
        """What the step at a decoder layer found, one entry a sample."""
        return [carried for kind, place, carried in self.log if kind is AtDecoder and place == layer]

    @property
    def carried(self) -> list[float]:
        """What every picture carried to the projector, in the order of the call."""
        return [carried for kind, _, carried in self.log if kind is AtProjector]


@dataclass(frozen=True)
class Thins(TokenReducer):
    """Keeps a known number before the language model, and inside it as many as it likes."""

    keep: Keep = 0.5

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(keep=self.keep), AtDecoder(layer=2)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        count = len(tokens) // 3 if isinstance(step, AtDecoder) else tokens.keep
        return Selection(torch.arange(count))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_single_tiles_is_there_inside(llava: Model, call: str) -> None:
    reducer = Carries()
    _run(llava, reducer, [1], call)
    (value,) = reducer.carried
    assert reducer.found(1) == [value]
    assert reducer.found(3) == [["inside", value]]


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_several_pictures_are_a_list_in_batches(llava: Model, call: str) -> None:
    """In the order of the prompt; a prompt without pictures has no step inside."""
    reducer = Carries()
    _run(llava, reducer, [1, 3, 0, 2], call)
    first, *others = reducer.carried
    expected = [first, others[:3], others[3:]]
    assert len({*reducer.carried}) == 6
    assert reducer.found(1) == expected
    assert reducer.found(3) == [["inside", each] for each in expected]


def test_beams_find_the_same_in_every_copy(llava: Model) -> None:
    reducer = Carries()
    with reduce_tokens(llava, reducer):
        llava.generate(**prompts(llava, [1, 2]), **GREEDY, num_beams=2)
    first, *others = reducer.carried
    assert reducer.found(1) == [first, first, others, others]


def test_without_a_cache_every_step_finds_it_again(llava: Model) -> None:
    reducer = Carries()
    with reduce_tokens(llava, reducer):
        llava.generate(**prompts(llava, [2]), **GREEDY, use_cache=False)
    assert reducer.found(1) == [reducer.carried] * 3


@pytest.mark.parametrize("images", [1, 2])
def test_nothing_carried_is_none(llava: Model, images: int) -> None:
    """What the last step before the language model carried counts."""
    reducer = Carries(silent=True)
    _run(llava, reducer, [images], "forward")
    assert reducer.found(1) == [None]


def test_tiles_of_a_picture_are_a_list_too(family_named: Any) -> None:
    """A family whose pictures come in tiles, newlines between."""
    family, reducer = family_named("llava_next"), Carries()
    with reduce_tokens(family.model, reducer), torch.no_grad():
        family.model(**family.alone)
    assert len(reducer.carried) > 1
    assert reducer.found(1) == [reducer.carried]


@pytest.mark.parametrize("images", [1, 2])
def test_members_of_a_chain_find_their_own(llava: Model, images: int) -> None:
    reducer = Carries()
    with reduce_tokens(llava, create("chain", reducers=(reducer,))), torch.no_grad():
        llava(**prompts(llava, [images]))
    (found,) = reducer.found(1)
    assert found == (reducer.carried if images > 1 else reducer.carried[0])


@pytest.mark.parametrize("images", [1, 2])
def test_members_of_a_chain_do_not_find_anothers(llava: Model, images: int) -> None:
    first, second = Carries(), Inside()
    with reduce_tokens(llava, create("chain", reducers=(Before(inner=first), second))), torch.no_grad():
        llava(**prompts(llava, [images]))
    assert second.log == [None]


def test_samples_in_a_row_do_not_mix(llava: Model) -> None:
    """What one call carried is not there in the next."""
    reducer = Carries()
    with reduce_tokens(llava, reducer), torch.no_grad():
        llava(**prompts(llava, [1], seed=1))
        llava(**prompts(llava, [1], seed=2))
    assert reducer.found(1) == reducer.carried
    assert len({*reducer.carried}) == 2


# Budgets.


@pytest.mark.parametrize("value", [192, 0.25])
def test_an_exact_entering_count_meets_a_budget_of_tokens(value: Keep) -> None:
    """Although a later step decides for itself how many it leaves."""
    solution = solve(Thins(), Budget("tokens", value), LLAVA, (SQUARE,), LlamaConfig())
    assert solution.expected == (192 if value == 192 else 144)
    assert solution.reducer == Thins(keep=value)


@pytest.mark.parametrize("currency", ["layer_mean", "flops"])
def test_what_layers_see_behind_an_adaptive_step_is_still_not_known(currency: Any) -> None:
    with pytest.raises(AdaptiveError, match="decides by the picture"):
        solve(Thins(), Budget(currency, 0.5), LLAVA, (SQUARE,), LlamaConfig())
    with pytest.raises(AdaptiveError):
        layer_counts(Thins(), LLAVA, SQUARE)


def test_an_adaptive_entering_count_is_still_refused() -> None:
    with pytest.raises(AdaptiveError):
        solve(create("prumerge"), Budget("tokens", 0.5), LLAVA, (SQUARE,), LlamaConfig())


@dataclass(frozen=True)
class Before(Wrapped):
    """Another method's steps before the language model alone."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [step for step in self.inner.steps(geometry) if not isinstance(step, AtDecoder)]


@dataclass(frozen=True)
class Inside(TokenReducer):
    """A step inside the language model that writes down what it finds."""

    log: list[Any] = field(default_factory=list)

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtDecoder(layer=2, keep=0.25)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        self.log.append(tokens.carried)
        return Selection(torch.arange(tokens.keep))


def _run(model: Model, reducer: TokenReducer, images: list[int], call: str) -> None:
    inputs = prompts(model, images)
    with reduce_tokens(model, reducer), torch.no_grad():
        if call == "forward":
            model(**inputs)
        else:
            model.generate(**inputs, **GREEDY)
