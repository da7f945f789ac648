"""The position ids that rows carry into the language model, under either policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import Positions
from tokenreduce.testing import prompts


def ids(model: LlavaForConditionalGeneration, name: str, keep: float, positions: Positions) -> tuple[Tensor, Tensor]:
    """The position ids of one prompt in the first layer, and those of the three tokens that follow it."""
    seen: list[Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True
    )
    inputs: dict[str, Any] = prompts(model, [1])
    try:
        with reduce_tokens(model, create(name, keep=keep, positions=positions)):
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    finally:
        hook.remove()
    return seen[0], torch.cat(seen[1:])


@pytest.mark.parametrize("name", ["divprune", "visionzip", "prunesid", "holov", "apet"])
def test_original_ids_ascend_to_the_end_of_the_whole_prompt(llava: LlavaForConditionalGeneration, name: str) -> None:
    """Also of methods with an order of their own, and with rows that stand for no token."""
    inputs = prompts(llava, [1])["input_ids"][0]
    visual = inputs == llava.config.image_token_id
    found, following = ids(llava, name, 0.5, "original")
    assert len(found) < len(inputs)
    assert found.equal(found.unique(sorted=True))
    assert following.tolist() == [len(inputs), len(inputs) + 1, len(inputs) + 2]
    text = torch.isin(found, visual.nonzero()[:, 0], invert=True)
    assert found[text].equal((~visual).nonzero()[:, 0])
    compact, following = ids(llava, name, 0.5, "compact")
    assert compact.tolist() == list(range(len(found)))
    assert following.tolist() == [len(found), len(found) + 1, len(found) + 2]


@pytest.mark.parametrize("name", ["divprune", "fopru_rank", "todre"])
def test_where_all_is_kept_the_policies_are_one(llava: LlavaForConditionalGeneration, name: str) -> None:
    for one, other in zip(ids(llava, name, 1.0, "original"), ids(llava, name, 1.0, "compact"), strict=True):
        assert one.equal(other)
