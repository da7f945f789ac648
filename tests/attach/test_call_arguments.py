"""Whatever a caller may tell the stock model's ``forward`` and ``generate`` is honoured inside, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import AtDecoder, Geometry, TokenReducer
from tokenreduce.testing import Identity, prompts, tiny_llava

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
NEW = 4
KEEPING = {
    "keep all at the projector": Identity(),
    "keep all at the projector, original": Identity(positions="original"),
    "keep all in the decoder": Identity(site=AtDecoder(layer=2, keep=1.0)),
}
REDUCING = {
    "fopru_rank": create("fopru_rank", keep=0.5),
    "fopru_rank, original": create("fopru_rank", keep=0.5, positions="original"),
    "tome": create("tome", keep=0.5),
    "fastv": create("fastv", keep=0.3, layer=1),
    "fastv, compact": create("fastv", keep=0.3, layer=1, positions="compact"),
    "pyramiddrop": create("pyramiddrop"),
    "vtw": create("vtw"),
    "chain": create("chain", reducers=({"name": "fopru_rank", "keep": 0.5}, {"name": "fastv", "keep": 0.5})),
}
Inputs = dict[str, Any]
Change = Callable[[Inputs], Inputs]


def _mask(dtype: torch.dtype) -> Change:
    return lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}


def _positions(dtype: torch.dtype) -> Change:
    return lambda inputs: {**inputs, "position_ids": _counted(inputs).to(dtype)}


def _counted(inputs: Inputs) -> Tensor:
    return (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)


def _whole_mask(form: str) -> Change:
    """The causal mask of the whole prompt, ``(rows, 1, length, length)``; padding sees itself alone."""

    def change(inputs: Inputs) -> Inputs:
        valid = inputs["attention_mask"].bool()
        rows, length = valid.shape
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, :]
        allowed = (allowed | torch.eye(length, dtype=torch.bool))[:, None]
        if form == "float":
            allowed = torch.zeros(rows, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return {**inputs, "attention_mask": allowed}

    return change


def _without(name: str) -> Change:
    return lambda inputs: {key: value for key, value in inputs.items() if key != name}


def _with(**options: Any) -> Change:
    return lambda inputs: {**inputs, **options}


SAME: dict[str, Change] = {
    "mask of int32": _mask(torch.int32),
    "mask of uint8": _mask(torch.uint8),
    "mask of bool": _mask(torch.bool),
    "mask of float": _mask(torch.float32),
    "mask of half": _mask(torch.float16),
    "whole mask of bool": _whole_mask("bool"),
    "whole mask of float": _whole_mask("float"),
    "no cache": _with(use_cache=False),
    "a tuple": _with(return_dict=False),
    "hidden states": _with(output_hidden_states=True),
    "all logits": _with(logits_to_keep=0),
    "the last logits": _with(logits_to_keep=1),
    "three logits": _with(logits_to_keep=3),
}
"""Ways of saying what changes no logits."""
OTHERS: dict[str, Change] = {
    "positions": _positions(torch.long),
    "positions of int32": _positions(torch.int32),
    "positions of float": _positions(torch.float32),
    "positions further on": lambda inputs: {**inputs, "position_ids": _counted(inputs) + 7},
    "a word masked": lambda inputs: {**inputs, "attention_mask": _hidden(inputs, -2)},
    "a visual token masked": lambda inputs: {**inputs, "attention_mask": _hidden(inputs, -8)},
    "other features": _with(vision_feature_layer=-1),
    "several features": _with(vision_feature_layer=-3),
    "the class token too": _with(vision_feature_select_strategy="full"),
}
"""What gives other logits than without it."""

WAYS = ["inputs", "no mask", "no mask, inputs", "mask of None", "mask of bool", "mask of int32", "mask of float"]
WAYS += ["no cache", "positions", "positions of int32", "None among the inputs"]
LAYERS = Geometry(encoder_layers=4, decoder_layers=4, feature_layer=2, class_token=True)


def _hidden(inputs: Inputs, column: int) -> Tensor:
    mask = inputs["attention_mask"].clone()
    mask[:, column] = 0
    return mask


@pytest.mark.parametrize("rows", [[1], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("way", [*SAME, *OTHERS])
@pytest.mark.parametrize("name", KEEPING)
def test_keeping_all_is_the_plain_forward(llava: Model, name: str, way: str, rows: list[int]) -> None:
    inputs = {**SAME, **OTHERS}[way](prompts(llava, rows))
    plain = _plain(llava, inputs)
    with reduce_tokens(llava, KEEPING[name]):
        found = _or_refused(llava, inputs, way)
    if found is not None:
        valid = prompts(llava, rows)["attention_mask"].bool()[:, -plain.shape[1] :]
        assert torch.equal(found[:, -1], plain[:, -1])
        if found.shape == plain.shape:
            assert torch.equal(found[valid], plain[valid])


@pytest.mark.parametrize("rows", [[1], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("way", SAME)
@pytest.mark.parametrize("name", REDUCING)
def test_the_same_said_otherwise_gives_the_same_forward(llava: Model, name: str, way: str, rows: list[int]) -> None:
    inputs = prompts(llava, rows)
    changed = SAME[way](inputs)
    _plain(llava, changed)
    with reduce_tokens(llava, REDUCING[name]) as attachment:
        with torch.no_grad():
            expected, samples = llava(**inputs).logits, attachment.samples
        found = _or_refused(llava, changed, way)
        if found is None:
            return
        assert attachment.samples == samples
    count = changed.get("logits_to_keep") or expected.shape[1]
    assert found.shape[1] == count
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-5)  # rounds otherwise in fewer rows


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.float32], ids=str)
def test_positions_in_another_dtype_are_the_same(llava: Model, name: str, kind: torch.dtype) -> None:
    inputs = _positions(torch.long)(prompts(llava, [1, 2, 0]))
    changed = {**inputs, "position_ids": inputs["position_ids"].to(kind)}
    if not torch.equal(_plain(llava, changed), _plain(llava, inputs)):
        pytest.skip("not even in the plain model")
    with reduce_tokens(llava, REDUCING[name]), torch.no_grad():
        expected = llava(**inputs).logits
        found = _or_refused(llava, changed, "positions")
    assert found is None or torch.equal(found[:, -1], expected[:, -1])


@pytest.mark.parametrize("name", REDUCING)
def test_a_masked_visual_token_is_never_brought_back(llava: Model, name: str) -> None:
    """Whatever stands there changes nothing, or the mask is refused."""
    inputs = prompts(llava, [1])
    inputs["attention_mask"][0, -8:-4] = 0
    with torch.no_grad():
        plain = llava(**inputs).logits[:, -1]
    assert plain.isfinite().all()
    with reduce_tokens(llava, REDUCING[name]) as attachment:
        if _or_refused(llava, inputs, "mask") is None:
            return
        kept = set(attachment.samples[0].images[0].kept)
    first = int((inputs["input_ids"][0] == llava.config.image_token_id).nonzero()[0, 0])
    hidden = {column - first for column in (inputs["attention_mask"][0] == 0).nonzero()[:, 0].tolist()}
    assert not kept & {token for token in hidden if 0 <= token < 36}


def test_hidden_states_have_the_lengths_of_the_layers(llava: Model) -> None:
    inputs = prompts(llava, [1])
    with reduce_tokens(llava, REDUCING["chain"]) as attachment, torch.no_grad():
        states = llava(**inputs, output_hidden_states=True).hidden_states
        generated = llava.generate(**inputs, **GREEDY, output_hidden_states=True, return_dict_in_generate=True)
        lengths = attachment.samples[0].lengths
    assert [each.shape[1] for each in states[1:]] == list(lengths)
    assert [each.shape[1] for each in generated.hidden_states[0][1:]] == list(lengths)
    assert [each.shape[1] for each in generated.hidden_states[1]] == [1] * 5


@pytest.mark.parametrize("name", [*KEEPING, *REDUCING])
def test_attentions_have_the_lengths_of_the_layers(name: str) -> None:
    model = tiny_llava(attention="eager")
    inputs = prompts(model, [1])
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
        with reduce_tokens(model, {**KEEPING, **REDUCING}[name]) as attachment:
            expected = model(**inputs).logits
            found = model(**inputs, output_attentions=True)
    assert torch.equal(found.logits, expected)
    assert [tuple(each.shape[2:]) for each in found.attentions] == [(n, n) for n in attachment.samples[0].lengths]
    if name in KEEPING:
        assert all(map(torch.equal, found.attentions, plain.attentions))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*KEEPING, *REDUCING])
def test_ways_of_calling_generate(llava: Model, name: str, way: str) -> None:
    reducer = {**KEEPING, **REDUCING}[name]
    batch = prompts(llava, [1, 2, 0])
    ids, mask, pixels = (batch[key] for key in ("input_ids", "attention_mask", "pixel_values"))
    ways: dict[str, dict[str, Any]] = {
        "inputs": {"inputs": ids, "attention_mask": mask, "pixel_values": pixels},
        # transformers finds the padding of a prompt without a mask by its token
        "no mask": {"input_ids": ids, "pixel_values": pixels},
        "no mask, inputs": {"inputs": ids, "pixel_values": pixels},
        "mask of None": {"input_ids": ids, "attention_mask": None, "pixel_values": pixels},
        "mask of bool": {"input_ids": ids, "attention_mask": mask.bool(), "pixel_values": pixels},
        "mask of int32": {"input_ids": ids, "attention_mask": mask.int(), "pixel_values": pixels},
        "mask of float": {"input_ids": ids, "attention_mask": mask.float(), "pixel_values": pixels},
        "no cache": {**batch, "use_cache": False},
        "positions": {**batch, "position_ids": _counted(batch)},
        "positions of int32": {**batch, "position_ids": _counted(batch).int()},
        "None among the inputs": {**batch, "inputs_embeds": None, "past_key_values": None},
    }
    inputs = ways[way]
    plain, answered = llava.generate(**batch, **GREEDY), _answers(llava, inputs)
    if answered is None or not torch.equal(answered, plain):
        pytest.skip("the plain model does not take it")
    if way == "no cache" and any(isinstance(step, AtDecoder) for step in reducer.steps(LAYERS)):
        pytest.skip("every step then chooses anew")
    with reduce_tokens(llava, reducer) as attachment:
        expected = llava.generate(**batch, **GREEDY)
        samples = attachment.samples
        found = llava.generate(**inputs, **GREEDY)
    assert torch.equal(found[:, -NEW:], expected[:, -NEW:])
    assert attachment.samples == samples


@pytest.mark.parametrize("way", ["bool", "float", "none", "no cache", "hidden states", "tuple", "logits"])
@pytest.mark.parametrize("site", ["projector", "decoder"])
def test_keeping_all_is_the_plain_forward_on_every_family(family: Any, site: str, way: str) -> None:
    reducer: TokenReducer = Identity() if site == "projector" else KEEPING["keep all in the decoder"]
    changes: dict[str, Change] = {
        "bool": _mask(torch.bool),
        "float": _mask(torch.float32),
        "none": _without("attention_mask"),
        "no cache": _with(use_cache=False),
        "hidden states": _with(output_hidden_states=True),
        "tuple": _with(return_dict=False),
        "logits": _with(logits_to_keep=2),
    }
    inputs = changes[way](dict(family.alone))
    plain = _plain(family.model, inputs)
    with reduce_tokens(family.model, reducer):
        found = _or_refused(family.model, inputs, way)
    assert found is None or torch.equal(found, plain)


@pytest.mark.parametrize("way", ["bool", "float", "int32"])
@pytest.mark.parametrize("name", ["fopru_rank", "fastv"])
def test_masks_of_any_dtype_on_every_family(family: Any, name: str, way: str) -> None:
    kinds = {"bool": torch.bool, "float": torch.float32, "int32": torch.int32}
    inputs = _mask(kinds[way])(dict(family.batch))
    if (plain := _answers(family.model, inputs)) is None:
        pytest.skip("the plain model does not take it")
    assert torch.equal(plain, family.model.generate(**family.batch, **GREEDY))
    with reduce_tokens(family.model, REDUCING[name]) as attachment:
        expected = family.model.generate(**family.batch, **GREEDY)
        samples = attachment.samples
        found = family.model.generate(**inputs, **GREEDY)
    assert torch.equal(found[:, -NEW:], expected[:, -NEW:])
    assert attachment.samples == samples


def _or_refused(model: Any, inputs: Inputs, way: str) -> Tensor | None:
    """The logits of a call; None where it was refused by an argument's name."""
    try:
        with torch.no_grad():
            output = model(**inputs)
    except ValueError as refused:
        assert any(name in str(refused) for name in inputs if name not in ("input_ids", "pixel_values"))
        return None
    return output[0] if isinstance(output, tuple) else output.logits


def _plain(model: Any, inputs: Inputs) -> Tensor:
    """The plain model's logits; skips what it does not take."""
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:
        pytest.skip(f"the plain model does not take it: {type(error).__name__}")
    return output[0] if isinstance(output, tuple) else output.logits


def _answers(model: Any, inputs: Inputs) -> Tensor | None:
    """The plain model's answers; None where it does not take these."""
    try:
        return model.generate(**inputs, **GREEDY)
    except Exception:
        return None
