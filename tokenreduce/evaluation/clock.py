"""Times and memory, measured side by side on the machine at hand; they never come from earlier runs.

The time to first token is that of ``generate(max_new_tokens=1)`` on single prompts: vision tower, selection, prefill
and one token. Methods take turns on every prompt, so that a slow moment of the machine falls on all of them alike.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tokenreduce.attach import reduce_tokens
from tokenreduce.evaluation.statistics import Estimate, ratio_of_medians
from tokenreduce.reducer import TokenReducer

ReducerFor = Callable[[int], TokenReducer | None]
"""The reducer that a method uses on the i-th prompt; None for the plain model, which nothing is attached to."""

WARM_UP = 2


@dataclass(frozen=True)
class Times:
    """Seconds: the ``median``, and as ``low`` and ``high`` the 10 % and 90 % quantiles.

    ratio: this median to the reference's, paired by prompt.
    """

    median: float
    low: float
    high: float
    ratio: Estimate


def first_token_times(
    model: PreTrainedModel,
    methods: Mapping[str, ReducerFor],
    prompts: Sequence[Mapping[str, Any]],
    pairs: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """The time to first token of every method; the first one is the reference.

    ``prompts`` are single-row inputs of ``generate``, taken in turn until each method has been timed ``pairs`` times.
    """
    if pairs < 1 or not prompts:
        raise ValueError(f"times need at least one pair and one prompt, not {pairs} and {len(prompts)}")
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(-WARM_UP, pairs):
        place = turn % len(prompts)
        for name, reducer_for in methods.items():
            with attached(model, reducer_for(place)):
                elapsed = _seconds(model, prompts[place])
            if turn >= 0:
                seconds[name].append(elapsed)
        if turn >= 0:
            advance()
    reference = next(iter(seconds.values()))
    times = {}
    for name, values in seconds.items():
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
        times[name] = Times(median, low, high, ratio_of_medians(values, reference))
    return times


def _seconds(model: PreTrainedModel, inputs: Mapping[str, Any]) -> float:
    generate: Callable[..., object] = model.generate
    synchronise(model.device)
    start = time.perf_counter()
    generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    synchronise(model.device)
    return time.perf_counter() - start


def attached(model: PreTrainedModel, reducer: TokenReducer | None) -> AbstractContextManager[Any]:
    """The reducer's context, or an empty one for the plain model."""
    return nullcontext() if reducer is None else reduce_tokens(model, reducer)


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes at the highest point while ``work`` runs, or None where that cannot be measured.

    On a GPU the allocator's peak; on Linux the resident memory of the whole process, from the kernel's resettable
    high-water mark.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not _reset_high_water_mark():
        return None
    work()
    return _high_water_mark()


def _reset_high_water_mark() -> bool:
    """Set the kernel's mark to the memory in use now, after giving back what the C library only keeps for later."""
    if sys.platform != "linux":
        return False
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library without malloc_trim: its reserve stays in the figure
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _high_water_mark() is not None


def _high_water_mark() -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
