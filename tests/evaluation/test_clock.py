"""Times are taken in turns, memory is what was really used."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenreduce import create
from tokenreduce.evaluation import clock
from tokenreduce.evaluation.run import Runner


@pytest.fixture
def prompts(model: Any, processor: Any, cards: Any) -> list[dict[str, torch.Tensor]]:
    runner = Runner(model, processor, cards(count=6))
    return [runner.inputs([sample]) for sample in runner.samples()[::3]]


def test_methods_take_turns_on_every_prompt(model: Any, prompts: list[dict[str, torch.Tensor]]) -> None:
    turns = []

    def method(name: str, reducers: list[Any]) -> clock.ReducerFor:
        def reducer_for(place: int) -> Any:
            turns.append((name, place))
            return reducers[place]

        return reducer_for

    random = [create("random", keep=4), create("random", keep=9)]
    methods = {"plain": method("plain", [None, None]), "random": method("random", random)}
    times = clock.first_token_times(model, methods, prompts, pairs=3)
    assert turns[2 * clock.WARM_UP :] == [(name, place) for place in (0, 1, 0) for name in ("plain", "random")]
    assert all(0 < each.low <= each.median <= each.high for each in times.values())


def test_a_slower_method_shows_as_one(
    model: Any, prompts: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = 0

    def generate(**kwargs: Any) -> None:
        nonlocal turn
        turn += 1
        time.sleep(0.002 if turn % 2 else 0.006)

    monkeypatch.setattr(model, "generate", generate)
    done = []
    times = clock.first_token_times(
        model, {"fast": lambda _: None, "slow": lambda _: None}, prompts, 12, lambda: done.append(1)
    )
    assert len(done) == 12
    assert times["fast"].ratio.value == 1
    low, ratio, high = times["slow"].ratio.low, times["slow"].ratio.value, times["slow"].ratio.high
    assert low is not None and high is not None
    assert 1.2 < low <= ratio <= high < 4
    assert 0.006 <= times["slow"].low <= times["slow"].median <= times["slow"].high


def test_the_plain_model_is_timed_with_nothing_attached(model: Any, prompts: list[dict[str, torch.Tensor]]) -> None:
    with clock.attached(model, None):
        assert "generate" not in vars(model)
    with clock.attached(model, create("random")):
        assert "generate" in vars(model)


def test_nothing_cannot_be_timed(model: Any) -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        clock.first_token_times(model, {"plain": lambda _: None}, [], 3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_peak_memory_sees_what_came_and_went() -> None:
    def use(megabytes: int) -> None:
        np.ones(megabytes << 20, dtype=np.uint8)

    cpu = torch.device("cpu")
    first = clock.peak_memory(cpu, lambda: use(300))
    then = clock.peak_memory(cpu, lambda: use(100))
    assert first is not None and then is not None
    assert first - then == pytest.approx(200 << 20, abs=40 << 20), "an earlier peak does not cover a later one"


def test_peak_memory_that_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refused)
    assert clock.peak_memory(torch.device("cpu"), lambda: None) is None
    assert clock.peak_memory(torch.device("meta"), lambda: None) is None
