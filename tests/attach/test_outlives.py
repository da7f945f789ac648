"""What outlives the context, or is taken out of it: a copied or saved model is a plain one, and a key-value cache goes
on rightly or is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import AtDecoder, AtEncoder, AtEncoderOutput, AtProjector, Step, TokenReducer
from tokenreduce.testing import Identity, prompts, tiny_llava

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
NEW = 5
REDUCERS = {
    "keep all at the projector": Identity(),
    "keep all in the decoder": Identity(site=AtDecoder(layer=2, keep=1.0)),
    "fopru_rank": create("fopru_rank", keep=0.5),
    "fopru_rank, original": create("fopru_rank", keep=0.5, positions="original"),
    "tome": create("tome", keep=0.5),
    "visionzip": create("visionzip", keep=0.5),
    "downsample": create("downsample"),
    "no_image": create("no_image"),
    "fastv": create("fastv", keep=0.3, layer=1),
    "fastv, compact": create("fastv", keep=0.3, layer=1, positions="compact"),
    "pyramiddrop": create("pyramiddrop"),
    "dart": create("dart", keep=0.5, layer=1),
    "sparsevlm": create("sparsevlm", layers=(0, 1), keeps=(0.6, 0.3)),
    "vtw": create("vtw"),
    "chain": create("chain", reducers=({"name": "fopru_rank", "keep": 0.5}, {"name": "fastv", "keep": 0.5})),
}
SHORTENING = [name for name in REDUCERS if not name.startswith("keep all")]
AT_SITES: list[tuple[type[Step], TokenReducer]] = [
    (AtEncoder, create("tome", keep=0.5)),
    (AtEncoderOutput, create("visionzip", keep=0.5)),
    (AtProjector, create("fopru_rank", keep=0.5)),
    (AtDecoder, create("fastv", keep=0.5, layer=1)),
    (AtDecoder, create("vtw")),
]
SITES = [pytest.param(site, reducer, id=f"{type(reducer).__name__}-{site.__name__}") for site, reducer in AT_SITES]
REFUSED = r"(?s)cache.*(reduce_tokens|without past_key_values|context)"
"""What a refusal says: that it is the cache, and what to do instead."""


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


SAVED: dict[str, Callable[[Any], Any]] = {"pickle": _pickled, "torch.save": _saved}


# Models.


@pytest.mark.parametrize("name", REDUCERS)
def test_a_copy_made_inside_is_a_plain_model_of_its_own(name: str) -> None:
    model = tiny_llava()
    inputs = prompts(model, [1])
    plain, answers = _logits(model, inputs), model.generate(**inputs, **GREEDY)
    with reduce_tokens(model, REDUCERS[name]):
        reduced = model.generate(**inputs, **GREEDY)
        copied = copy.deepcopy(model)
        assert torch.equal(_logits(copied, inputs), plain)
        assert torch.equal(model.generate(**inputs, **GREEDY), reduced)
    assert torch.equal(_logits(copied, inputs), plain)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(_logits(copied, inputs), plain)
    assert torch.equal(copied.generate(**inputs, **GREEDY), answers)
    with reduce_tokens(copied, REDUCERS[name]):
        assert torch.equal(copied.generate(**inputs, **GREEDY), reduced)
    assert torch.equal(_logits(copied, inputs), plain)


@pytest.mark.parametrize("way", SAVED)
@pytest.mark.parametrize("name", REDUCERS)
def test_a_model_saved_inside_is_a_plain_model(name: str, way: str) -> None:
    model = tiny_llava()
    inputs = prompts(model, [1])
    with reduce_tokens(model, REDUCERS[name]):
        saved = SAVED[way](model)  # before any call: transformers' own hooks cannot be pickled afterwards
        reduced = model.generate(**inputs, **GREEDY)
    assert torch.equal(_logits(saved, inputs), _logits(model, inputs))
    assert torch.equal(saved.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    with reduce_tokens(saved, REDUCERS[name]):
        assert torch.equal(saved.generate(**inputs, **GREEDY), reduced)


@pytest.mark.parametrize("name", ["fopru_rank", "tome", "fastv"])
def test_a_copy_can_be_attached_while_the_original_is(name: str) -> None:
    model = tiny_llava()
    inputs = prompts(model, [1])
    with reduce_tokens(model, REDUCERS[name]):
        reduced = model.generate(**inputs, **GREEDY)
        copied = copy.deepcopy(model)
        with reduce_tokens(copied, REDUCERS[name]):
            assert torch.equal(copied.generate(**inputs, **GREEDY), reduced)
        assert torch.equal(model.generate(**inputs, **GREEDY), reduced)


@pytest.mark.parametrize("name", ["fopru_rank", "tome", "visionzip", "fastv", "vtw"])
def test_a_part_copied_inside_is_a_plain_part(name: str) -> None:
    model = tiny_llava()
    inputs = prompts(model, [1])
    pixels, embeddings = inputs["pixel_values"], torch.randn(1, 9, 64)
    with torch.no_grad():
        seen = model.model.vision_tower(pixels).last_hidden_state
        said = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        with reduce_tokens(model, REDUCERS[name]):
            tower, decoder = copy.deepcopy(model.model.vision_tower), copy.deepcopy(model.model.language_model)
            reduced = model.generate(**inputs, **GREEDY)
            model.model.vision_tower, model.model.language_model = tower, decoder
        assert torch.equal(tower(pixels).last_hidden_state, seen)
        assert torch.equal(decoder(inputs_embeds=embeddings).last_hidden_state, said)
        with reduce_tokens(model, REDUCERS[name]):
            assert torch.equal(model.generate(**inputs, **GREEDY), reduced)


@pytest.mark.parametrize(("site", "reducer"), SITES)
def test_a_copy_is_plain_on_every_family(family: Any, site: type[Step], reducer: TokenReducer) -> None:
    _skip_unless_hosted(family, site)
    plain = family.model.generate(**family.alone, **GREEDY)
    with reduce_tokens(family.model, reducer):
        copied = copy.deepcopy(family.model)
    assert torch.equal(copied.generate(**family.alone, **GREEDY), plain)


def test_weights_saved_inside_are_the_models_own(llava: Model, tmp_path: Any) -> None:
    names = list(llava.state_dict())
    with reduce_tokens(llava, REDUCERS["chain"]):
        assert list(llava.state_dict()) == names
        llava.save_pretrained(tmp_path)
    inputs = prompts(llava, [1])
    loaded = Model.from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(loaded, inputs), _logits(llava, inputs))


# Caches outside.


@pytest.mark.parametrize("source", ["forward", "generate"])
@pytest.mark.parametrize("name", SHORTENING)
def test_a_shortened_cache_is_refused_outside(llava: Model, name: str, source: str) -> None:
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, prompts(llava, [1]), source)
    with pytest.raises(ValueError, match=REFUSED):
        _next_turn(llava, sequences, copy.deepcopy(cache))
    with pytest.raises(ValueError, match=REFUSED):
        _next_forward(llava, sequences, copy.deepcopy(cache))
    assert cache.get_seq_length() > 0
    assert [len(layer.keys) for layer in cache.layers] == [1] * 4


@pytest.mark.parametrize("name", ["keep all at the projector", "keep all in the decoder"])
def test_a_whole_cache_goes_on_outside_or_is_refused(llava: Model, name: str) -> None:
    sequences, cache = _first_turn(llava, prompts(llava, [1]), "generate")
    expected = _next_turn(llava, sequences, cache)
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, prompts(llava, [1]), "generate")
    try:
        assert torch.equal(_next_turn(llava, sequences, cache), expected)
    except ValueError as refused:
        assert "reduce_tokens" in str(refused)


@pytest.mark.parametrize(("site", "reducer"), SITES)
def test_a_shortened_cache_is_refused_outside_on_every_family(
    family: Any, site: type[Step], reducer: TokenReducer
) -> None:
    _skip_unless_hosted(family, site)
    with reduce_tokens(family.model, reducer):
        sequences, cache = _first_turn(family.model, family.alone, "generate")
    with pytest.raises(ValueError, match=REFUSED):
        _next_turn(family.model, sequences, copy.deepcopy(cache))
    with pytest.raises(ValueError, match=REFUSED):
        _next_forward(family.model, sequences, copy.deepcopy(cache))


@pytest.mark.parametrize("name", SHORTENING)
def test_a_shortened_cache_is_refused_by_another_model(name: str) -> None:
    model, other = tiny_llava(seed=1), tiny_llava(seed=2)
    with reduce_tokens(model, REDUCERS[name]):
        sequences, cache = _first_turn(model, prompts(model, [1]), "generate")
        with pytest.raises(ValueError, match=REFUSED):  # within the context, by a model that has none
            _next_turn(other, sequences, copy.deepcopy(cache))
    with reduce_tokens(other, REDUCERS[name]), pytest.raises(ValueError, match=REFUSED):
        _next_turn(other, sequences, copy.deepcopy(cache))
    with reduce_tokens(other, REDUCERS[name]), pytest.raises(ValueError, match=REFUSED):
        _next_forward(other, sequences, copy.deepcopy(cache))


@pytest.mark.parametrize("name", REDUCERS)
def test_a_cache_goes_on_in_a_new_context_of_its_model(llava: Model, name: str) -> None:
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, prompts(llava, [1]), "generate")
        kept = copy.deepcopy(cache)
        expected = _next_turn(llava, sequences, cache)
    with reduce_tokens(llava, REDUCERS[name]):
        assert torch.equal(_next_turn(llava, sequences, kept), expected)


@pytest.mark.parametrize("then", ["fopru_rank", "fastv", "vtw"])
@pytest.mark.parametrize("name", SHORTENING)
def test_a_cache_goes_on_in_a_context_of_another_reducer_or_is_refused(llava: Model, name: str, then: str) -> None:
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, prompts(llava, [1]), "generate")
        kept = copy.deepcopy(cache)
        expected = _next_turn(llava, sequences, cache)
    with reduce_tokens(llava, REDUCERS[then]):
        try:
            assert torch.equal(_next_turn(llava, sequences, kept), expected)
        except ValueError as refused:
            assert "cache" in str(refused)


@pytest.mark.parametrize("name", SHORTENING)
def test_a_plain_cache_goes_on_inside(llava: Model, name: str) -> None:
    """What was computed outside, of a whole prompt, is nobody's to shorten."""
    sequences, cache = _first_turn(llava, prompts(llava, [1]), "generate")
    kept = copy.deepcopy(cache)
    expected = _next_turn(llava, sequences, cache)
    with reduce_tokens(llava, REDUCERS[name]):
        assert torch.equal(_next_turn(llava, sequences, kept), expected)


# Caches that a caller has changed, inside. Right is what a prompt that stands alone goes on with.


@pytest.mark.parametrize("name", REDUCERS)
def test_a_repeated_cache_goes_on_for_every_copy(llava: Model, name: str) -> None:
    rows = [prompts(llava, [1], seed=1), prompts(llava, [1], seed=2)]
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, batch, "generate")
        cache.batch_repeat_interleave(2)
        more = torch.tensor([[17, 18], [19, 20], [17, 21], [22, 23]])
        together = _next_turn(llava, sequences.repeat_interleave(2, dim=0), cache, more)
        assert torch.equal(together, torch.cat([_alone(llava, rows[n // 2], more[n]) for n in range(4)]))


@pytest.mark.parametrize("order", [[2, 0, 3], [3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_reordered_cache_goes_on_for_every_row(llava: Model, name: str, how: str, order: list[int]) -> None:
    """Rows of different lengths, so that what was taken from each must follow it."""
    batch = prompts(llava, [1, 0, 2, 1])
    more = torch.tensor([[17, 18], [19, 20], [21, 22], [23, 24]])[: len(order)]
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, batch, "generate")
        getattr(cache, how)(torch.tensor(order))
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)[order]
        together = _next_turn(llava, sequences[order], cache, more, mask)
        expected = [_alone(llava, _row(llava, batch, row), more[n]) for n, row in enumerate(order)]
        assert torch.equal(together, torch.cat(expected))


@pytest.mark.parametrize("name", REDUCERS)
def test_a_cropped_cache_goes_on_another_way(llava: Model, name: str) -> None:
    inputs, more = prompts(llava, [1]), torch.tensor([[17, 18]])
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, inputs, "generate")
        cache.crop(-3)
        cropped = _next_turn(llava, sequences[:, :-3], cache, more)
        sequences, cache = _first_turn(llava, inputs, "generate", max_new_tokens=NEW - 3)
        assert torch.equal(cropped, _next_turn(llava, sequences, cache, more))


@pytest.mark.parametrize("name", REDUCERS)
def test_a_last_word_cropped_and_fed_again_changes_nothing(llava: Model, name: str) -> None:
    """A crop that reaches into the prompt's own words."""
    inputs = prompts(llava, [1])
    ids = inputs["input_ids"]
    with reduce_tokens(llava, REDUCERS[name]), torch.no_grad():
        first = llava(**inputs)
        first.past_key_values.crop(-1)
        again = llava(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values)
    torch.testing.assert_close(again.logits[:, -1], first.logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHORTENING)
def test_a_crop_amid_the_visual_tokens_is_refused(llava: Model, name: str) -> None:
    inputs = prompts(llava, [1])
    length = inputs["input_ids"].shape[1]
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, inputs, "forward")
        with pytest.raises(ValueError, match=r"crop|cache"):
            cache.crop(-5)
            _next_turn(llava, sequences[:, : length - 5], cache)


@pytest.mark.parametrize("name", REDUCERS)
def test_copies_of_a_cache_branch(llava: Model, name: str) -> None:
    inputs = prompts(llava, [1])
    first, second = torch.tensor([[17, 18]]), torch.tensor([[19, 20, 21]])
    with reduce_tokens(llava, REDUCERS[name]):
        sequences, cache = _first_turn(llava, inputs, "generate")
        copies = [copy.deepcopy(cache), copy.deepcopy(cache)]
        answers = [_next_turn(llava, sequences, each, more) for each, more in zip(copies, (first, second), strict=True)]
        assert torch.equal(answers[0], _alone(llava, inputs, first[0]))
        assert torch.equal(answers[1], _alone(llava, inputs, second[0]))
        assert torch.equal(_next_turn(llava, sequences, cache, second), answers[1])


@pytest.mark.parametrize("name", REDUCERS)
def test_a_cache_that_was_emptied_begins_anew(llava: Model, name: str) -> None:
    first, second = prompts(llava, [1], seed=1), prompts(llava, [2], seed=2)
    with reduce_tokens(llava, REDUCERS[name]):
        expected = llava.generate(**second, **GREEDY)
        _, cache = _first_turn(llava, first, "generate")
        cache.reset()
        assert torch.equal(llava.generate(**second, **GREEDY, past_key_values=cache), expected)


@pytest.mark.parametrize("how", ["reorder", "repeat", "crop", "copy"])
@pytest.mark.parametrize(("site", "reducer"), SITES)
def test_changed_caches_go_on_on_every_family(family: Any, site: type[Step], reducer: TokenReducer, how: str) -> None:
    _skip_unless_hosted(family, site)
    model, inputs = family.model, family.batch

    def answers(how: str = "", said: int = NEW) -> Tensor:
        """Of a conversation whose cache was changed after ``said`` tokens."""
        sequences, cache = _first_turn(model, inputs, "generate", max_new_tokens=said)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, said), value=1)
        rows = torch.arange(len(sequences))
        if how == "reorder":
            rows = torch.tensor([2, 0, 1])
            cache.reorder_cache(rows)
        elif how == "repeat":
            rows = rows.repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        elif how == "crop":
            sequences, mask = sequences[:, :-2], mask[:, :-2]
            cache.crop(-2)
        elif how == "copy":
            cache = copy.deepcopy(cache)
        more = torch.tensor([[17, 18]]).expand(len(rows), 2)
        return _next_turn(model, sequences[rows], cache, more, mask[rows])

    def changed_and_not() -> tuple[Tensor, Tensor]:
        found, expected = answers(how), answers(said=NEW - 2 if how == "crop" else NEW)
        if how == "reorder":
            expected = expected[[2, 0, 1]]
        elif how == "repeat":
            expected = expected.repeat_interleave(2, dim=0)
        return found, expected

    try:
        if not torch.equal(*changed_and_not()):
            pytest.skip("not even the plain model: it counts positions by the rows of its last prompts")
    except RuntimeError:
        pytest.skip("a full sliding window cannot be cropped")
    with reduce_tokens(model, reducer):
        assert torch.equal(*changed_and_not())


def _first_turn(model: Any, inputs: dict[str, Tensor], source: str, **options: Any) -> tuple[Tensor, Any]:
    """What was said so far, and the cache of it."""
    if source == "forward":
        with torch.no_grad():
            return inputs["input_ids"], model(**inputs, use_cache=True).past_key_values
    output = model.generate(**inputs, **{**GREEDY, **options}, return_dict_in_generate=True)
    return output.sequences, output.past_key_values


def _next_turn(
    model: Any, sequences: Tensor, cache: Any, more: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """The answers ``(rows, new)`` of a conversation that goes on with ``more`` ``(rows, n)``."""
    more = torch.full((len(sequences), 2), 17) if more is None else more
    mask = torch.ones_like(sequences) if mask is None else mask
    mask = torch.nn.functional.pad(mask, (0, more.shape[1]), value=1)
    ids = torch.cat([sequences, more], dim=1)
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)[:, -NEW:]


def _next_forward(model: Any, sequences: Tensor, cache: Any) -> Tensor:
    """The logits of one more token, as a hand-written loop asks for them."""
    mask = torch.ones(1, sequences.shape[1] + 1, dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[17]]), attention_mask=mask, past_key_values=cache).logits


def _alone(model: Any, inputs: dict[str, Tensor], more: Tensor) -> Tensor:
    sequences, cache = _first_turn(model, inputs, "generate")
    return _next_turn(model, sequences, cache, more[None])


def _row(model: Model, batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt of ``batch`` by itself, without padding."""
    valid = batch["attention_mask"][row].bool()
    single = {name: batch[name][row, valid][None] for name in ("input_ids", "attention_mask")}
    counts = (batch["input_ids"] == model.config.image_token_id).sum(-1) // model.config.image_seq_length
    start = int(counts[:row].sum())
    if counts[row]:
        single["pixel_values"] = batch["pixel_values"][start : start + int(counts[row])]
    return single


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _skip_unless_hosted(family: Any, site: type[Step]) -> None:
    if site not in family.sites:
        pytest.skip(f"{family.name} hosts no step {site.__name__}")
