"""A step inside the language model says who may attend to whom, in every layer behind it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.attach.stage import Stage
from tokenreduce.reducer import AtDecoder, AtProjector, Geometry, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.signals import DecoderAttention
from tokenreduce.testing import check_reducer, prompts, tiny_llava


@dataclass(frozen=True)
class Says(TokenReducer):
    """Keeps all tokens, or half of them, and says something of all pairs, or of some."""

    what: Literal["nothing", "hide the first half", "see all", "hide all", "misshapen", "floating"] = "nothing"
    site: Literal["decoder", "projector"] = "decoder"
    keep: float = 1.0

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        if self.site == "projector":
            return [AtProjector(keep=1.0)]
        return [AtDecoder(layer=1, keep=self.keep, sees=(DecoderAttention(0),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        selection = Selection(torch.arange(len(tokens))[-tokens.keep :])
        if self.site == "projector":
            return replace(selection, sight=torch.zeros(1, 1, dtype=torch.int8))
        attention = tokens[step.sees[0]]
        length = attention.keys.shape[1] + (self.what == "misshapen")
        sight = torch.zeros(length, length, dtype=torch.float32 if self.what == "floating" else torch.int8)
        if self.what == "hide the first half":
            sight[attention.text, : int(attention.text[0]) // 2] = -1
        if self.what == "hide all":
            sight -= 1
        if self.what == "see all":
            sight += 1
        return replace(selection, sight=sight)


def logits(model: LlavaForConditionalGeneration, reducer: TokenReducer) -> torch.Tensor:
    with reduce_tokens(model, reducer), torch.no_grad():
        return model(**prompts(model, [1, 3])).logits[:, -1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("what", ["nothing", "hide the first half", "see all"])
def test_it_keeps_the_invariants(what: str, keep: float, attention: str) -> None:
    model = tiny_llava(attention=attention)
    check_reducer(Says(what=what, keep=keep), model, prompts(model, [1, 3, 0]))  # type: ignore[arg-type]


def test_what_is_said_changes_what_is_computed(llava: LlavaForConditionalGeneration) -> None:
    plain = logits(llava, create("none"))
    torch.testing.assert_close(logits(llava, Says()), plain)
    for what in ("hide the first half", "see all"):
        assert (logits(llava, Says(what=what)) - plain).abs().max() > 1e-4


def test_it_goes_on_behind_a_later_cut(llava: LlavaForConditionalGeneration) -> None:
    chain = create("chain", reducers=[create("yopo", layer=1, cut=2), create("fastv", layer=3, keep=0.5)])
    check_reducer(chain, llava, prompts(llava, [1, 3, 0]))


@pytest.mark.parametrize("padding", [False, True])
def test_one_token_at_a_time_is_all_at_once(llava: LlavaForConditionalGeneration, padding: bool) -> None:
    inputs = prompts(llava, [1, 3] if padding else [2])
    cache = DynamicCache()
    with reduce_tokens(llava, create("yopo", layer=1, cut=2)), torch.no_grad():
        llava(**inputs, past_key_values=cache)
        more = torch.tensor([[5, 6, 7]]).expand(len(inputs["input_ids"]), -1)
        together = llava(**turn(inputs, more), past_key_values=copy.deepcopy(cache)).logits[:, -1]
        for count in (1, 2, 3):
            last = llava(**turn(inputs, more[:, :count], count - 1), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, together, atol=1e-5, rtol=1e-4)


def turn(inputs: dict[str, torch.Tensor], more: torch.Tensor, before: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    return {"input_ids": more[:, before:], "attention_mask": mask}


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (Says(what="misshapen"), r"sight of shape \(\d+, \d+\) for a sequence of \d+: give int8"),
        (Says(what="floating"), "torch.float32 sight"),
        (Says(what="hide all"), "hides a token from itself"),
        (Says(site="projector"), "Says says who may attend to whom before the language model: only AtDecoder"),
    ],
)
def test_what_cannot_be_said_is_refused(
    llava: LlavaForConditionalGeneration, reducer: TokenReducer, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        logits(llava, reducer)


def test_a_kernel_that_takes_no_mask_is_refused() -> None:
    valid, kernel = torch.ones(1, 3, dtype=torch.bool), SimpleNamespace(kernel="flash_attention_2")
    stage = replace(Stage.whole(valid), sight=torch.zeros(1, 3, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"flash_attention_2 takes no mask .* load the model with sdpa"):
        stage.mask(valid.long(), kernel, torch.float32)  # type: ignore[arg-type]


def test_a_cache_of_such_a_prompt_is_nobody_elses(llava: LlavaForConditionalGeneration) -> None:
    cache = DynamicCache()
    with reduce_tokens(llava, create("yopo", layer=1, cut=2)), torch.no_grad():
        llava(**prompts(llava, [1]), past_key_values=cache)
    with pytest.raises(ValueError, match="visual tokens were reduced"):
        llava(input_ids=torch.tensor([[5]]), past_key_values=cache)
