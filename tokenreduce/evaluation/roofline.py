"""The best possible speed of this machine, and whether computing or reading limits it.

A language model reads its weights once for a whole prompt, and once again for every new token. Where computing takes
less time than this, a shorter prompt cannot be faster (Williams et al. 2009, the roofline model).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenreduce.evaluation.result import Bound, Limits, Machine, Roofline
from tokenreduce.flops import head_dim, key_width
from tokenreduce.models.family import family_of
from tokenreduce.registry import MODELS
from tokenreduce.stopwatch import synchronise

_REPEATS = 3
_LONG_ENOUGH = 0.02
_LARGEST = 16384
_COPIED = 1 << 28


def limits(model: PreTrainedModel) -> Limits:
    """This machine, for this model."""
    machine, weights = machine_of(model.device, model.dtype), _weights(model)
    balance = machine.flops / machine.bytes
    return Limits(machine.flops, machine.bytes, balance * _nbytes(weights) / (2 * _numel(weights)))


def roofline(model: PreTrainedModel, llm_flops: float, kv_bytes: float) -> Roofline:
    """The least time of a prompt whose prefill is ``llm_flops`` and leaves a key-value cache of ``kv_bytes``."""
    machine, weights, config = machine_of(model.device, model.dtype), _weights(model), model.config.get_text_config()
    moved = _nbytes(weights) + kv_bytes
    attended = kv_bytes / (2 * key_width(config) * model.dtype.itemsize)  # tokens, summed over layers
    decode_flops = 2 * _numel(weights) + 4 * attended * config.num_attention_heads * head_dim(config)
    return Roofline(_bound(machine, llm_flops, moved), _bound(machine, decode_flops, moved))


@cache
def machine_of(device: torch.device, dtype: torch.dtype) -> Machine:
    """This machine's speeds, the best of a few tries that take about a second together."""
    side = 128
    while True:  # ever larger products, which are ever more efficient, until one takes its time
        left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        product = _seconds(device, partial(torch.matmul, left, right))
        if product > _LONG_ENOUGH or side == _LARGEST:
            break
        side *= 2
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    copy = _seconds(device, partial(torch.empty_like(source).copy_, source))
    return Machine(flops=2 * side**3 / product, bytes=2 * _COPIED / copy)


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """The weights that every forward call of the language model reads: its layers and its output layer."""
    layers: Any = family_of(model, MODELS.usable()).decoder.layers
    return [*layers.parameters(), *model.get_output_embeddings().parameters()]


def _numel(weights: Sequence[Tensor]) -> int:
    return sum(each.numel() for each in weights)


def _nbytes(weights: Sequence[Tensor]) -> int:
    return sum(each.nbytes for each in weights)


def _bound(machine: Machine, flops: float, moved: float) -> Bound:
    computing, reading = flops / machine.flops, moved / machine.bytes
    return Bound(flops / moved, reading > computing, max(computing, reading))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS + 1):  # the first one warms up
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
