"""Times and memory, measured side by side on the machine at hand; they never come from earlier runs.

Times are those of short answers to single prompts: until the logits of the first token are there, in parts, and
for every token after it. Methods take turns on every prompt, so that a slow moment of the machine falls on all of them
alike, and all of them run on the model's own attention kernel.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tokenreduce.attach import reduce_tokens
from tokenreduce.evaluation.backend import Times
from tokenreduce.evaluation.result import FirstToken, Parts, Spread, Timed
from tokenreduce.evaluation.statistics import ratio_of_medians
from tokenreduce.reducer import TokenReducer
from tokenreduce.stopwatch import Stopwatch, part

WARM_UP = 2
"""Turns that do not count."""


PARTS = tuple(field.name for field in fields(Parts))
"""The parts of the time before the first token."""

DECODED = 8
"""Tokens after the first one, over which the time of one is averaged."""


def take_times(
    model: PreTrainedModel,
    methods: Mapping[str, Sequence[TokenReducer | None]],
    prompts: Sequence[Mapping[str, Any]],
    pairs: int,
    advance: Callable[[], None] = lambda: None,
    questions: Sequence[str] | None = None,
    processor: Any = None,
) -> dict[str, Times]:
    """The times of every method; the first one is the reference.

    ``methods`` have a reducer for every prompt, or None for the plain model, which nothing is attached to. ``prompts``
    are single-row inputs of ``generate``, taken in turn until each method has been timed ``pairs`` times;
    ``questions`` is what they ask and ``processor`` the model's, for reducers that read with them.
    """
    if pairs < 1 or not prompts:
        raise ValueError(f"times need at least one pair and one prompt, not {pairs} and {len(prompts)}")
    taken: dict[str, list[Counter[str]]] = {name: [] for name in methods}
    for turn in range(-WARM_UP, pairs):
        place = turn % len(prompts)
        for name, reducers in methods.items():
            with attached(model, reducers[place], questions[place] if questions else None, processor):
                seconds = seconds_by_part(model, prompts[place])
            if turn >= 0:
                taken[name].append(seconds)
        if turn >= 0:
            advance()
    first = {name: [sum(turn[part] for part in PARTS) for turn in turns] for name, turns in taken.items()}
    further = {name: [turn["decoding"] / DECODED for turn in turns] for name, turns in taken.items()}
    reference = next(iter(taken))
    return {
        name: Times(
            FirstToken(
                **vars(_timed(first[name], first[reference])),
                parts=Parts(**{part: _spread([turn[part] for turn in turns]) for part in PARTS}),
            ),
            _timed(further[name], further[reference]),
        )
        for name, turns in taken.items()
    }


def seconds_by_part(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Counter[str]:
    """One answer of ``1 + DECODED`` tokens: the :data:`PARTS` of its first one, and ``decoding`` for the others."""
    generate: Callable[..., object] = model.generate
    stopwatch = Stopwatch(model.device)
    with _marked(model, stopwatch), stopwatch.running("llm"):
        generate(**inputs, max_new_tokens=1 + DECODED, min_new_tokens=1 + DECODED, do_sample=False)
    return stopwatch.seconds()


@contextmanager
def _marked(model: PreTrainedModel, stopwatch: Stopwatch) -> Iterator[None]:
    """Mark the vision side, and the end of prefill, in any model, a plain one too."""
    base = model.base_model
    with ExitStack() as stack:
        for name in ("get_image_features", "get_video_features"):
            if hasattr(base, name):
                setattr(base, name, _as_vision(getattr(base, name)))
                stack.callback(delattr, base, name)

        def first_logits(*_: Any) -> None:
            stopwatch.switch("decoding")
            stopping.remove()

        stopping = model.get_output_embeddings().register_forward_hook(first_logits)
        stack.callback(stopping.remove)
        yield


def _as_vision(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with part("vision"):
            return call(*args, **kwargs)

    return timed


def _spread(seconds: Sequence[float]) -> Spread:
    low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9]).tolist()
    return Spread(median, low, high)


def _timed(seconds: Sequence[float], reference: Sequence[float]) -> Timed:
    return Timed(**vars(_spread(seconds)), ratio=ratio_of_medians(seconds, reference))


def attached(
    model: PreTrainedModel,
    reducer: TokenReducer | None,
    question: str | Sequence[str] | None = None,
    processor: Any = None,
) -> AbstractContextManager[Any]:
    """The reducer's context, or an empty one for the plain model."""
    if reducer is None:
        return nullcontext()
    return reduce_tokens(model, reducer, question=question, processor=processor)


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
