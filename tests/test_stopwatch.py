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


def test_a_second_run_starts_at_nothing() -> None:
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.running("rest"):
            stopwatch.switch("more")
            time.sleep(0.002)
    assert 0.002 <= stopwatch.seconds()["more"] < 0.004
