"""Speculative decoding, from the prompt's own words or a draft model's, gives what greedy decoding gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import AtDecoder, AtEncoder, AtEncoderOutput, AtInput, AtProjector, Step, TokenReducer
from tokenreduce.testing import Identity, prompts

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
NEW = 8
WAYS = ["lookup", "text model", "copy of the model"]
REDUCERS = {
    "keep all at the projector": Identity(),
    "keep all in the decoder": Identity(site=AtDecoder(layer=2, keep=1.0)),
    "fopru_rank": create("fopru_rank", keep=0.5),
    "fopru_rank, original": create("fopru_rank", keep=0.5, positions="original"),
    "divprune": create("divprune", keep=0.3),
    "downsample": create("downsample"),
    "no_image": create("no_image"),
    "tome": create("tome", keep=0.5),
    "visionzip": create("visionzip", keep=0.5),
    "fastv": create("fastv", keep=0.3, layer=1),
    "fastv, compact": create("fastv", keep=0.3, layer=1, positions="compact"),
    "fastv, all queries": create("fastv", keep=0.3, layer=2, queries="all"),
    "pyramiddrop": create("pyramiddrop"),
    "dart": create("dart", keep=0.5, layer=1),
    "sparsevlm": create("sparsevlm", layers=(0, 1), keeps=(0.6, 0.3)),
    "vtw": create("vtw"),
    "chain": create("chain", reducers=({"name": "fopru_rank", "keep": 0.5}, {"name": "fastv", "keep": 0.5})),
}
AT_SITES: list[tuple[type[Step], TokenReducer]] = [
    (AtInput, create("downsample")),
    (AtEncoder, create("tome", keep=0.5)),
    (AtEncoderOutput, create("visionzip", keep=0.5)),
    (AtProjector, create("fopru_rank", keep=0.5)),
    (AtProjector, Identity()),
    (AtDecoder, create("fastv", keep=0.5, layer=1)),
    (AtDecoder, create("pyramiddrop")),
    (AtDecoder, create("vtw")),
    (AtDecoder, Identity(site=AtDecoder(layer=1, keep=1.0))),
    (AtDecoder, Identity(site=AtDecoder(layer=-1, keep=1.0))),
]
SITES = [pytest.param(site, reducer, id=f"{type(reducer).__name__}-{site.__name__}") for site, reducer in AT_SITES]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REDUCERS)
def test_the_same_as_greedy(llava: Model, name: str, way: str) -> None:
    options = _options(llava, way)
    for seed in range(3):
        inputs = _repeating(llava, seed)
        with reduce_tokens(llava, REDUCERS[name]) as attachment:
            greedy = llava.generate(**inputs, **GREEDY)
            samples = attachment.samples
            assisted = llava.generate(**inputs, **GREEDY, **options)
        assert assisted[0, -NEW:].tolist() == greedy[0, -NEW:].tolist()
        assert attachment.samples == samples


@pytest.mark.parametrize("way", ["lookup", "copy of the model"])
@pytest.mark.parametrize(("site", "reducer"), SITES)
def test_the_same_as_greedy_on_every_family(family: Any, site: type[Step], reducer: TokenReducer, way: str) -> None:
    if site not in family.sites:
        pytest.skip(f"{family.name} hosts no step {site.__name__}")
    model, options = family.model, _options(family.model, way)
    inputs = _longer(family.alone, family.alone["input_ids"][:, -4:])  # from the first token on there is a guess
    if not torch.equal(model.generate(**inputs, **GREEDY, **options), model.generate(**inputs, **GREEDY)):
        pytest.skip("not even the plain model: its prompt attends to guesses both ways")
    with reduce_tokens(model, reducer) as attachment:
        greedy = model.generate(**inputs, **GREEDY)
        samples = attachment.samples
        assisted = model.generate(**inputs, **GREEDY, **options)
    assert assisted[0, -NEW:].tolist() == greedy[0, -NEW:].tolist()
    assert attachment.samples == samples


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REDUCERS)
def test_a_conversation_goes_on_as_after_greedy(llava: Model, name: str, way: str) -> None:
    """What was guessed wrong is gone from the cache, in layers of every length."""
    inputs, options = _repeating(llava, 0), _options(llava, way)
    answers = []
    with reduce_tokens(llava, REDUCERS[name]):
        for first_way in ({}, options):
            first = llava.generate(**inputs, **GREEDY, **first_way, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, torch.tensor([[17, 18, 19]])], dim=1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
            answers.append(llava.generate(**more, **GREEDY)[0, -NEW:].tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["fopru_rank", "fastv", "chain"])
def test_a_later_turn_is_the_same_or_refused(llava: Model, name: str) -> None:
    """transformers 5.23 feeds the whole conversation again on top of a filled cache, and so answers wrongly itself."""
    inputs = _repeating(llava, 1)

    def later(**way: Any) -> list[int]:
        first = llava.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        more = _longer({"input_ids": first.sequences}, first.sequences[:, -5:])
        mask = torch.ones_like(more["input_ids"])
        answers = llava.generate(**more, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY, **way)
        return answers[0, -NEW:].tolist()

    with reduce_tokens(llava, REDUCERS[name]):
        greedy = later()
        try:
            assert later(prompt_lookup_num_tokens=3) == greedy
        except ValueError as refused:
            assert "past_key_values" in str(refused)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_model_that_drafts_for_itself(llava: Model, name: str) -> None:
    """The same as greedy, or refused with the argument's name."""
    inputs = _repeating(llava, 0)
    with reduce_tokens(llava, REDUCERS[name]):
        greedy = llava.generate(**inputs, **GREEDY)
        try:
            assisted = llava.generate(**inputs, **GREEDY, assistant_model=llava)
        except ValueError as refused:
            assert "assistant_model" in str(refused)
            return
    assert torch.equal(assisted, greedy)


@pytest.mark.parametrize("name", ["fopru_rank", "fastv"])
def test_a_reduced_model_drafts_for_a_plain_one(llava: Model, name: str) -> None:
    """The other way round, the draft model is the reduced one: the same as greedy of the plain one, or refused."""
    inputs, plain = _repeating(llava, 0), copy.deepcopy(llava)
    greedy = plain.generate(**inputs, **GREEDY)
    with reduce_tokens(llava, REDUCERS[name]):
        try:
            assisted = plain.generate(**inputs, **GREEDY, assistant_model=llava)
        except ValueError as refused:
            assert "mm_encoder_outputs" in str(refused)
            return
    assert torch.equal(assisted, greedy)


def test_lengths_and_callbacks_are_the_callers_own(llava: Model) -> None:
    inputs = _repeating(llava, 2)
    length = inputs["input_ids"].shape[1]
    with reduce_tokens(llava, REDUCERS["chain"]):
        greedy = llava.generate(**inputs, do_sample=False, max_length=length + NEW, repetition_penalty=1.3)
        assisted = llava.generate(
            **inputs, do_sample=False, max_length=length + NEW, repetition_penalty=1.3, prompt_lookup_num_tokens=3
        )
    assert torch.equal(assisted, greedy)


def _options(model: PreTrainedModel, way: str) -> dict[str, Any]:
    if way == "lookup":
        return {"prompt_lookup_num_tokens": 3}
    if way == "copy of the model":
        return {"assistant_model": copy.deepcopy(model)}
    text = model.config.get_text_config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=text.vocab_size,
                pad_token_id=0,
            )
        ).eval()
    small.generation_config.eos_token_id = None
    return {"assistant_model": small}


def _repeating(model: Model, seed: int) -> dict[str, Tensor]:
    """A prompt whose last words stand in it before, so that there is something to look up from the first token on."""
    inputs = prompts(model, [1], seed=seed)
    words, ids = inputs["input_ids"][:, 1:4], inputs["input_ids"]
    start = {"input_ids": torch.cat([words, ids], dim=1), "attention_mask": torch.ones(1, 3 + ids.shape[1]).long()}
    return _longer({**inputs, **start}, words[:, :2])


def _longer(inputs: dict[str, Tensor], more: Tensor) -> dict[str, Tensor]:
    """The inputs with the text ``more`` ``(rows, n)`` behind every prompt."""
    tails = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    shape = inputs["input_ids"].shape
    return {
        name: torch.cat([value, tails.get(name, torch.zeros_like(more))], dim=1) if value.shape == shape else value
        for name, value in inputs.items()
    }
