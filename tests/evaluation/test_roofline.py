"""The roofline says what a machine of known speed can do at best with a model of known size."""

from __future__ import annotations

import pytest
import torch

from tokenreduce import reduce_tokens
from tokenreduce.evaluation import roofline
from tokenreduce.evaluation.costs import prefill_cost
from tokenreduce.evaluation.result import Machine
from tokenreduce.testing import prompts, tiny_llava


def test_a_short_prompt_is_memory_bound_and_a_long_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava(grid=8)
    monkeypatch.setattr(roofline, "machine_of", lambda *_: Machine(flops=1e9, bytes=1e8))
    limits = roofline.limits(model)
    assert limits.break_even_tokens == 20, "10 FLOPs a byte, and two for every weight of four bytes"

    with reduce_tokens(model, "none") as whole, torch.no_grad():
        model(**prompts(model, [1]))
    with reduce_tokens(model, "uniform", keep=2) as little, torch.no_grad():
        model(**prompts(model, [1]))
    (long,), (short,) = (prefill_cost(model, attachment.samples) for attachment in (whole, little))
    assert whole.samples[0].lengths[0] > 20 > little.samples[0].lengths[0]
    computing = roofline.roofline(model, long.llm_flops, long.kv_bytes)
    reading = roofline.roofline(model, short.llm_flops, short.kv_bytes)
    assert not computing.prefill.memory_bound and reading.prefill.memory_bound
    assert computing.prefill.seconds == long.llm_flops / 1e9
    weights = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    assert reading.prefill.seconds == (sum(each.nbytes for each in weights) + short.kv_bytes) / 1e8
    assert computing.decode.memory_bound and computing.decode.seconds > reading.decode.seconds
    assert computing.decode.intensity < 1 < computing.prefill.intensity


def test_a_machines_speeds_are_measured_once() -> None:
    machine = roofline.machine_of(torch.device("cpu"), torch.float32)
    assert machine is roofline.machine_of(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.flops < 1e15 and 1e8 < machine.bytes < 1e14
