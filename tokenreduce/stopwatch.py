"""Where the time of a call goes, by parts that are marked in the code and timed only while a stopwatch runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch

_running: ContextVar[Stopwatch | None] = ContextVar("tokenreduce_stopwatch", default=None)


class Stopwatch:
    """Seconds of one call by part. A part within another counts for itself alone.

    On a CUDA device moments are events in its stream, so that nothing waits before the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[tuple[str, Any]] = []

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Time what is done within; ``part`` is what counts where nothing else is marked."""
        synchronise(self._device)
        self._moments.clear()
        token = _running.set(self)
        self.switch(part)
        try:
            yield
        finally:
            self._moments.append(("", self._moment()))
            _running.reset(token)

    def switch(self, part: str) -> str:
        """Let the time from now on count for ``part``; returns what it counted for so far."""
        before = self._moments[-1][0] if self._moments else ""
        self._moments.append((part, self._moment()))
        return before

    def seconds(self) -> Counter[str]:
        """The time of every part, once the device is done."""
        synchronise(self._device)
        total: Counter[str] = Counter()
        for (part, start), (_, end) in pairwise(self._moments):
            total[part] += start.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - start
        return total

    def _moment(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        synchronise(self._device)  # an accelerator without events is waited for
        return time.perf_counter()


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is done within counts for this part of a call, if a stopwatch is running."""
    stopwatch = _running.get()
    if stopwatch is None:
        yield
        return
    before = stopwatch.switch(name)
    try:
        yield
    finally:
        stopwatch.switch(before)


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
