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
from tokenreduce.evaluation.prompts import Prompts
from tokenreduce.evaluation.transformers_backend import TransformersBackend
from tokenreduce.stopwatch import part


@pytest.fixture
def prompts(model: Any, processor: Any, cards: Any) -> list[dict[str, torch.Tensor]]:
    prompts, backend = Prompts(cards(count=6)), TransformersBackend(model, processor)
    return [backend.inputs([prompts.prompt(sample)]) for sample in prompts.samples(0, 6)[::3]]


def test_methods_take_turns_on_every_prompt(model: Any, prompts: list[dict[str, torch.Tensor]]) -> None:
    turns = []

    class Watched(list[Any]):
        """Reducers that remember when they were asked for."""

        def __init__(self, name: str, reducers: list[Any]) -> None:
            super().__init__(reducers)
            self.name = name

        def __getitem__(self, place: Any) -> Any:
            turns.append((self.name, place))
            return super().__getitem__(place)

    random = [create("random", keep=4), create("random", keep=9)]
    methods = {"plain": Watched("plain", [None, None]), "random": Watched("random", random)}
    times = clock.take_times(model, methods, prompts, pairs=3)
    assert turns[2 * clock.WARM_UP :] == [(name, place) for place in (0, 1, 0) for name in ("plain", "random")]
    spreads = [spread for each in times.values() for spread in (each.time_to_first_token, each.decode_per_token)]
    assert all(0 < each.low <= each.median <= each.high for each in spreads)


def test_a_slower_method_shows_as_one(
    model: Any, prompts: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the slow one's 6 ms before the first token 4 are its reducer's; decoding is as fast."""
    turn = 0

    def generate(**kwargs: Any) -> None:
        nonlocal turn
        turn += 1
        with part("vision"):
            time.sleep(0.001)
            if turn % 2 == 0:
                with part("selection"):
                    time.sleep(0.004)
        time.sleep(0.001)
        model.get_output_embeddings()(torch.zeros(1, 1, model.get_output_embeddings().in_features))
        time.sleep(0.008)

    monkeypatch.setattr(model, "generate", generate)
    done: list[int] = []
    times = clock.take_times(model, {"fast": [None, None], "slow": [None, None]}, prompts, 12, lambda: done.append(1))
    fast, slow = (times[name].time_to_first_token for name in ("fast", "slow"))
    assert len(done) == 12
    assert fast.ratio.value == 1
    assert slow.ratio.low is not None and slow.ratio.high is not None
    assert 1.2 < slow.ratio.low <= slow.ratio.value <= slow.ratio.high < 5
    assert 0.006 <= slow.low <= slow.median <= slow.high
    assert fast.parts.selection.high == 0 and slow.parts.selection.low >= 0.004
    assert 0.001 <= slow.parts.vision.median < 0.003, "what is selected amid it does not count for it"
    assert 0.001 <= slow.parts.llm.median < 0.003
    for each in times.values():
        assert 0.001 <= each.decode_per_token.median < 0.003


def test_the_parts_of_a_real_answer_are_all_there(model: Any, prompts: list[dict[str, torch.Tensor]]) -> None:
    forwards = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    plain, reduced = (
        clock.seconds_by_part(model, prompts[0]),
        clock.take_times(model, {"pool": [create("pool", keep=4)] * 2}, prompts, 1)["pool"].time_to_first_token,
    )
    hook.remove()
    assert len(forwards) == (1 + 1 + clock.WARM_UP) * (1 + clock.DECODED)
    assert {"vision", "llm", "decoding"} <= plain.keys() and min(plain.values()) > 0
    assert all(part.median > 0 for part in vars(reduced.parts).values())
    assert reduced.median == pytest.approx(sum(part.median for part in vars(reduced.parts).values())), (
        "one turn: no medians"
    )
    assert "get_image_features" not in vars(model.base_model)


def test_the_plain_model_is_timed_with_nothing_attached(model: Any, prompts: list[dict[str, torch.Tensor]]) -> None:
    with clock.attached(model, None):
        assert "generate" not in vars(model)
    with clock.attached(model, create("random")):
        assert "generate" in vars(model)


def test_nothing_cannot_be_timed(model: Any) -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        clock.take_times(model, {"plain": []}, [], 3)


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
