"""Every way of generating, on the families that make it hardest: packing with newlines, positions in space and time,
and pictures seen both ways behind sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce import create, reduce_tokens
from tokenreduce.models.loading import load
from tokenreduce.reducer import AtDecoder, TokenReducer
from tokenreduce.testing import Identity
from tokenreduce.testing.checkpoints import ask, picture

Checkpoint = Callable[[str], Path]
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("llava_next", "qwen2_5_vl", "gemma3")]
NEW = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "sequences": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}
KEEPING = [Identity(), Identity(site=AtDecoder(layer=2, keep=1.0))]
REDUCING = [create("fopru_rank", keep=0.5), create("fastv", keep=0.5)]


class Loaded:
    """A model, a prompt alone, and that prompt in a batch with one that has no picture and one that has two."""

    def __init__(self, directory: Path) -> None:
        self.model, processor = load(str(directory))
        wide, tall, square = picture(0, 30, 90), picture(1, 60, 40), picture(2, 50, 50)
        self.alone = ask(processor, [[wide]])
        self.batch = ask(processor, [[wide], [], [square, tall]])

    def answers(self, inputs: dict[str, Tensor], reducer: TokenReducer | None = None, **options: Any) -> Tensor:
        options = {"do_sample": False, "max_new_tokens": NEW, **options}
        if reducer is None:
            return self.model.generate(**inputs, **options)
        with reduce_tokens(self.model, reducer):
            return self.model.generate(**inputs, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[Loaded]:
    yield Loaded(checkpoint(request.param))


@pytest.mark.parametrize("way", OPTIONS)
def test_keeping_everything_answers_as_the_plain_model(loaded: Loaded, way: str) -> None:
    plain = loaded.answers(loaded.alone, **OPTIONS[way])
    for reducer in KEEPING:
        assert torch.equal(loaded.answers(loaded.alone, reducer, **OPTIONS[way]), plain), reducer


@pytest.mark.parametrize("way", OPTIONS)
def test_answers_are_those_that_a_prompt_has_alone(loaded: Loaded, way: str) -> None:
    count = OPTIONS[way].get("num_return_sequences", 1)
    for reducer in REDUCING:
        alone = loaded.answers(loaded.alone, reducer, **OPTIONS[way])
        together = loaded.answers(loaded.batch, reducer, **OPTIONS[way])
        assert len(together) == 3 * count
        assert torch.equal(together[:count, -NEW:], alone[:, -NEW:]), reducer


def test_a_cache_changes_nothing_behind_the_projector(loaded: Loaded) -> None:
    with_cache, without = (loaded.answers(loaded.batch, REDUCING[0], use_cache=flag) for flag in (True, False))
    assert torch.equal(with_cache, without)


def test_a_conversation_goes_on_with_the_returned_cache(loaded: Loaded) -> None:
    """As the plain model's does where everything is kept; and, where the choice is the picture's alone, as the whole
    conversation asked at once."""

    def two_turns(inputs: dict[str, Tensor], reducer: TokenReducer | None, *, afresh: bool = False) -> Tensor:
        first: Any = loaded.answers(inputs, reducer, return_dict_in_generate=True)
        again = _longer(inputs, torch.cat([first.sequences, first.sequences[:, -3:]], dim=1))
        if afresh:
            return loaded.answers(again, reducer)
        text = {name: again[name] for name in again if again[name].shape == again["input_ids"].shape}
        return loaded.answers(text, reducer, past_key_values=first.past_key_values)

    for inputs in (loaded.alone, loaded.batch):
        plain = two_turns(inputs, None)
        for reducer in KEEPING:
            assert torch.equal(two_turns(inputs, reducer), plain), reducer
        reduced = two_turns(inputs, REDUCING[0])
        assert torch.equal(reduced, two_turns(inputs, REDUCING[0], afresh=True))


def _longer(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a prompt that goes on as ``ids`` do: text, and no padding."""
    added = ids.shape[1] - inputs["input_ids"].shape[1]
    tails = {"attention_mask": 1}
    return {
        name: torch.cat([value, value.new_full((len(value), added), tails.get(name, 0))], dim=1)
        if value.shape == inputs["input_ids"].shape
        else value
        for name, value in inputs.items()
    } | {"input_ids": ids}
