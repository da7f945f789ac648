"""Every reducer keeps the invariants on every kind of model, and the checks catch reducers that do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tokenreduce import available
from tokenreduce.reducer import AtProjector, Geometry, Selection, Span, Step, TokenReducer, VisualTokens
from tokenreduce.testing import INVARIANTS, Identity, InvariantError, check_reducer, prompts, tiny_llava

MODELS: dict[str, dict[str, Any]] = {
    "clip": {},
    "grouped-query siglip": {"tower": "siglip", "key_heads": 2},
    "eager": {"attention": "eager"},
    "grouped-query bfloat16": {"dtype": torch.bfloat16, "key_heads": 2},
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> LlavaForConditionalGeneration:
    return tiny_llava(**MODELS[request.param])


@pytest.mark.parametrize("images", [[1], [0, 3, 1]], ids=str)
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", [name for name in [*available("reducers"), "identity"] if name != "chain"])
def test_reducer(
    model: LlavaForConditionalGeneration,
    made: Callable[[str], TokenReducer],
    name: str,
    positions: Any,
    images: list[int],
) -> None:
    reducer = Identity(positions=positions) if name == "identity" else made(name).with_positions(positions)
    check_reducer(reducer, model, prompts(model, images))


@dataclass(frozen=True)
class _Bad(TokenReducer):
    """Breaks one promise a subclass."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(keep=0.5)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(tokens.keep))


class _Backwards(_Bad):
    """Breaks none: an order of its own is declared."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtProjector(keep=0.5, ordered=True)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(tokens.keep).flip(0))


def test_an_order_of_its_own_is_no_broken_promise(llava: LlavaForConditionalGeneration) -> None:
    check_reducer(_Backwards(), llava, prompts(llava, [1, 2]))


class _Forgetful(_Bad):
    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.randperm(len(tokens))[: tokens.keep].sort().values)


class _Greedy(_Bad):
    """Looks at how often it was called, so its choice depends on its neighbours in the batch."""

    calls = 0

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        type(self).calls = (type(self).calls + 1) % 4
        return Selection(torch.arange(tokens.keep) + type(self).calls)


class _Fickle(_Bad):
    """Promises something else every time it is asked."""

    promises = itertools.cycle([18, 17])

    def count(self, step: Step, span: Span) -> int | None:
        return next(self.promises)


@pytest.mark.parametrize(
    ("bad", "invariant"),
    [(_Forgetful, "runs_repeat"), (_Greedy, "neighbours_do_not_matter"), (_Fickle, "counts_are_exact")],
)
def test_a_broken_promise_is_found(llava: LlavaForConditionalGeneration, bad: type[_Bad], invariant: str) -> None:
    with pytest.raises(InvariantError):
        INVARIANTS[invariant](bad(), llava, prompts(llava, [1, 2]))


class _TooMany(_Bad):
    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(len(tokens)))


class _Twice(_Bad):
    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.zeros(tokens.keep, dtype=torch.long))


class _Floating(_Bad):
    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(tokens.keep).float())


class _Misshapen(_Bad):
    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(tokens.keep), features=tokens.features)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_TooMany, "_TooMany selected 36 tokens where its count said 18"),
        (_Twice, "_Twice selected a token twice"),
        (_Floating, "_Floating selected with a torch.float32 index"),
        (_Misshapen, r"_Misshapen returned features of shape \(36, 64\), not \(18, 64\)"),
    ],
)
def test_a_mistake_in_a_selection_is_an_error(
    llava: LlavaForConditionalGeneration, bad: type[_Bad], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        INVARIANTS["runs_repeat"](bad(), llava, prompts(llava))
