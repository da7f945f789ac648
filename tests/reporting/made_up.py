"""Builders of made-up records and metrics."""

from __future__ import annotations

from typing import Any

from tokenreduce.benchmarks.scenes import Scenes
from tokenreduce.evaluation.records import ImageRecord, Record, StepRecord

SIDE = 12
TOKENS = SIDE * SIDE


def record(benchmark: Scenes, index: int, steps: tuple[StepRecord, ...], *, right: bool) -> Record:
    sample = benchmark[index]
    entering = len(steps[-1].index) if steps else TOKENS
    return Record(
        id=sample.id,
        image_id=sample.image_id,
        category=sample.category,
        question=sample.question,
        expected=sample.answers,
        answer=sample.answers[0] if right else "nonsense",
        score=float(right),
        visual_tokens=TOKENS,
        entering=entering,
        images=(ImageRecord((1, SIDE, SIDE), steps),),
    )


def dropping(kept: range) -> tuple[StepRecord, ...]:
    source = tuple(kept.index(token) if token in kept else -1 for token in range(TOKENS))
    return (StepRecord("projector", tuple(kept), source),)


def pooling() -> tuple[StepRecord, ...]:
    source = tuple(token // SIDE // 2 * (SIDE // 2) + token % SIDE // 2 for token in range(TOKENS))
    return (StepRecord("projector", tuple(range(36)), source),)


def estimate(value: float, half: float | None = 0.02) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
    }


def method(name: str, runs: int, score: float, kept: float, **knobs: Any) -> dict[str, Any]:
    return {
        "name": name,
        "knobs": knobs,
        "runs": [f"{name}-{run:012x}" for run in range(runs)],
        "errors": 0,
        "score": estimate(score),
        "difference_to_unreduced": None if name == "none" else estimate(score - 0.9),
        "categories": {
            category: {"samples": 6, "score": estimate(score, None), "difference_to_unreduced": None}
            for category in ("existence", "counting")
        },
        "visual_tokens": {"total": TOKENS, "kept": kept, "layer_mean": kept},
        "prefill_flops": {"llm": 1e9, "vision": 5e8, "llm_ratio": 0.27, "total_ratio": 0.62},
        "time_to_first_token": {"median": 0.0379, "low": 0.03, "high": 0.04, "ratio": estimate(0.67)},
        "peak_memory": 600 << 20,
    }
