"""A stopwatch counts every moment once, and nothing while it does not run."""

from __future__ import annotations

import time

import pytest
import torch

from tokenreduce.stopwatch import Stopwatch, part

CPU = torch.device("cpu")


def test_every_moment_counts_for_the_innermost_part() -> None:
    stopwatch = Stopwatch(CPU)
    started = time.perf_counter()
    with stopwatch.running("rest"):
        time.sleep(0.002)
        with part("outer"):
            time.sleep(0.002)
            with part("inner"):
                time.sleep(0.004)
            time.sleep(0.002)
        with part("inner"):
            time.sleep(0.002)
    elapsed = time.perf_counter() - started
    seconds = stopwatch.seconds()
    assert set(seconds) == {"rest", "outer", "inner"}
    assert seconds["inner"] >= 0.006 and seconds["outer"] >= 0.004 and seconds["rest"] >= 0.002
    assert seconds.total() <= elapsed and seconds.total() == pytest.approx(elapsed, abs=0.002)


def test_a_part_that_fails_ends_there() -> None:
    stopwatch = Stopwatch(CPU)
    with pytest.raises(KeyError), stopwatch.running("rest"), part("broken"):
        raise KeyError
    with part("later"):
        pass
    assert set(stopwatch.seconds()) == {"rest", "broken"}


def test_on_a_gpu_moments_are_events_in_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[str] = []

    class Event:
        """Each one a millisecond after the one before it."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            self.place = len(recorded)
            recorded.append(stream)

        def elapsed_time(self, later: Event) -> float:
            return float(later.place - self.place)

    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    stopwatch = Stopwatch(torch.device("cuda", 1))
    with stopwatch.running("rest"), part("vision"), part("selection"):
        pass
    assert set(recorded) == {"stream of cuda:1"}
    assert waits == [torch.device("cuda", 1)], "nothing waits while time runs"
    assert stopwatch.seconds() == {"rest": 0.002, "vision": 0.002, "selection": 0.001}


def test_a_second_run_starts_at_nothing() -> None:
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.running("rest"):
            stopwatch.switch("more")
            time.sleep(0.002)
    assert 0.002 <= stopwatch.seconds()["more"] < 0.004
