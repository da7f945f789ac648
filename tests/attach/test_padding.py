"""What is kept of a prompt does not depend on the padding before or behind it, in a plain forward call either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import create, reduce_tokens
from tokenreduce.testing import prompts

REDUCERS = {
    "fastv": create("fastv", keep=0.5, layer=1),
    "fastv, compact": create("fastv", keep=0.5, layer=1, positions="compact"),
    "fastv, all queries": create("fastv", keep=0.5, layer=2, queries="all"),
    "pyramiddrop": create("pyramiddrop"),
    "pyramiddrop, last": create("pyramiddrop", ranks="last"),
    "dart": create("dart", keep=0.5, layer=1),
    "dart, deep": create("dart", keep=0.5, layer=3),
    "dart, compact": create("dart", keep=0.5, layer=2, positions="compact"),
    "sparsevlm": create("sparsevlm", layers=(0, 1), keeps=(0.6, 0.3)),
    "vtw": create("vtw"),
    "fopru, dart": create("chain", reducers=({"name": "fopru_rank", "keep": 0.7}, {"name": "dart", "keep": 0.5})),
    "fopru, original, dart": create(
        "chain",
        reducers=({"name": "fopru_rank", "keep": 0.7, "positions": "original"}, {"name": "dart", "keep": 0.5}),
    ),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_padded_prompt_keeps_what_it_keeps_alone(llava: Model, name: str, side: str) -> None:
    batch = _padded(prompts(llava, [1, 3, 0, 2]), side)
    with reduce_tokens(llava, REDUCERS[name]) as attachment, torch.no_grad():
        llava(**batch)
        together = attachment.samples
        for row in range(4):
            single = _row(llava, batch, row)
            if "pixel_values" not in single:
                continue
            llava(**single)
            assert together[row] == attachment.samples[0]


@pytest.mark.parametrize("columns", [1, 7, 40])
@pytest.mark.parametrize("name", REDUCERS)
def test_padding_alone_changes_nothing(llava: Model, name: str, columns: int) -> None:
    """A single prompt behind more or less padding, as a server that pads to fixed widths makes it."""
    inputs = prompts(llava, [1])
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (columns, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (columns, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    with reduce_tokens(llava, REDUCERS[name]) as attachment, torch.no_grad():
        llava(**inputs)
        samples = attachment.samples
        llava(**padded)
    assert attachment.samples == samples


@pytest.mark.parametrize("name", ["dart", "fastv", "pyramiddrop", "sparsevlm", "fopru, dart"])
def test_a_padded_prompt_keeps_what_it_keeps_alone_on_every_family(family: Any, name: str) -> None:
    with reduce_tokens(family.model, REDUCERS[name]) as attachment, torch.no_grad():
        family.model(**family.alone)
        (alone,) = attachment.samples
        family.model(**family.batch)
    assert attachment.samples[0] == alone


@pytest.mark.parametrize("name", REDUCERS)
def test_generate_and_forward_keep_the_same_of_a_padded_batch(llava: Model, name: str) -> None:
    batch = prompts(llava, [1, 3, 0, 2])
    with reduce_tokens(llava, REDUCERS[name]) as attachment, torch.no_grad():
        llava.generate(**batch, max_new_tokens=1, do_sample=False)
        samples = attachment.samples
        llava(**batch)
    assert attachment.samples == samples


def _padded(batch: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """A left-padded batch with its padding on a side."""
    if side == "left":
        return batch
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    texts = {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    return {**batch, **texts}


def _row(model: Model, batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt of ``batch`` by itself, without padding."""
    valid = batch["attention_mask"][row].bool()
    single = {name: batch[name][row, valid][None] for name in ("input_ids", "attention_mask")}
    counts = (batch["input_ids"] == model.config.image_token_id).sum(-1) // model.config.image_seq_length
    start = int(counts[:row].sum())
    if counts[row]:
        single["pixel_values"] = batch["pixel_values"][start : start + int(counts[row])]
    return single
