"""A picture in a later turn of a conversation is refused with the remedy, and never left whole in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import AtDecoder, AtEncoder, AtEncoderOutput, AtProjector, Step, TokenReducer
from tokenreduce.testing import Identity, prompts
from tokenreduce.testing.checkpoints import ask, picture

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
REMEDY = "pictures in a later turn need the whole conversation again: call without past_key_values"
REDUCERS = {
    "keep all at the projector": Identity(),
    "keep all in the decoder": Identity(site=AtDecoder(layer=2, keep=1.0)),
    "fopru_rank": create("fopru_rank", keep=0.5),
    "visionzip": create("visionzip", keep=0.5),
    "no_image": create("no_image"),
    "fastv": create("fastv", keep=0.3, layer=1),
    "fastv, compact": create("fastv", keep=0.3, layer=1, positions="compact"),
    "pyramiddrop": create("pyramiddrop"),
    "dart": create("dart", keep=0.5, layer=1),
    "sparsevlm": create("sparsevlm", layers=(0, 1), keeps=(0.6, 0.3)),
    "vtw": create("vtw"),
    "chain": create("chain", reducers=({"name": "fopru_rank", "keep": 0.5}, {"name": "fastv", "keep": 0.5})),
}
AT_SITES: list[tuple[type[Step], TokenReducer]] = [
    (AtEncoder, create("tome", keep=0.5)),
    (AtEncoderOutput, create("visionzip", keep=0.5)),
    (AtProjector, create("fopru_rank", keep=0.5)),
    (AtDecoder, create("fastv", keep=0.5, layer=1)),
    (AtDecoder, create("vtw")),
]
SITES = [pytest.param(site, reducer, id=f"{type(reducer).__name__}-{site.__name__}") for site, reducer in AT_SITES]


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("first", ["a picture", "text", "a picture, outside"])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_later_picture_is_refused(llava: Model, name: str, first: str, call: str) -> None:
    """With the cache of a first turn that was about a picture too, or about none, or that no reducer saw."""
    opening, more = prompts(llava, [0 if first == "text" else 1], seed=1), prompts(llava, [1], seed=2)
    if first == "a picture, outside":
        begun = llava.generate(**opening, **GREEDY, return_dict_in_generate=True)
    with reduce_tokens(llava, REDUCERS[name]), torch.no_grad():
        if first != "a picture, outside":
            begun = llava.generate(**opening, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([begun.sequences, more["input_ids"][:, 1:]], dim=1)
        later = {"attention_mask": torch.ones_like(ids), "past_key_values": begun.past_key_values}
        later["pixel_values"] = more["pixel_values"]
        with pytest.raises(ValueError, match=REMEDY):
            if call == "generate":
                llava.generate(input_ids=ids, **later, **GREEDY)
            else:  # the last token that was generated is not in the cache yet
                llava(input_ids=ids[:, begun.sequences.shape[1] - 1 :], **later)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_picture_with_an_empty_cache_is_reduced(llava: Model, name: str) -> None:
    inputs = prompts(llava, [1])
    with reduce_tokens(llava, REDUCERS[name]) as attachment:
        expected = llava.generate(**inputs, **GREEDY)
        samples = attachment.samples
        cache = DynamicCache(config=llava.config.get_text_config())
        assert torch.equal(llava.generate(**inputs, **GREEDY, past_key_values=cache), expected)
        assert attachment.samples == samples


@pytest.mark.parametrize("name", REDUCERS)
def test_the_whole_conversation_again_reduces_both_pictures(llava: Model, name: str) -> None:
    """What the refusal tells the caller to do."""
    first, second = prompts(llava, [1], seed=1), prompts(llava, [1], seed=2)
    with reduce_tokens(llava, REDUCERS[name]) as attachment:
        said = llava.generate(**first, **GREEDY)
        ids = torch.cat([said, second["input_ids"][:, 1:]], dim=1)
        pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
        llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **GREEDY)
        (sample,) = attachment.samples
    assert len(sample.images) == 2
    assert all(len(image.steps) == len(sample.images[0].steps) > 0 for image in sample.images)


@pytest.mark.parametrize(("site", "reducer"), SITES)
def test_a_later_picture_is_refused_on_every_family(family: Any, site: type[Step], reducer: TokenReducer) -> None:
    if site not in family.sites:
        pytest.skip(f"{family.name} hosts no step {site.__name__}")
    model = family.model
    more = ask(family.processor, [[picture(5, 40, 60)]])
    with reduce_tokens(model, reducer):
        begun = model.generate(**family.alone, **GREEDY, return_dict_in_generate=True)
        said = GREEDY["max_new_tokens"]
        texts = {name for name, value in more.items() if value.shape == more["input_ids"].shape}
        inputs: dict[str, Tensor] = {
            name: torch.cat(
                [pad(family.alone[name], (0, said), value=int(name == "attention_mask")), more[name]], dim=1
            )
            for name in texts
        }
        inputs["input_ids"] = torch.cat([begun.sequences, more["input_ids"]], dim=1)
        pictures = {name: value for name, value in more.items() if name not in texts}
        with pytest.raises(ValueError, match=REMEDY):
            model.generate(**inputs, **pictures, past_key_values=begun.past_key_values, **GREEDY)
