"""Builders of made-up records and results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenreduce.attach import ImageReduction, StepReduction
from tokenreduce.benchmarks.scenes import Scenes
from tokenreduce.evaluation.records import Record
from tokenreduce.evaluation.result import (
    BenchmarkResult,
    Bound,
    CategoryResult,
    FirstToken,
    MethodResult,
    Parts,
    PrefillFlops,
    Result,
    Roofline,
    RunResult,
    Settings,
    Spread,
    Timed,
    VisualTokens,
)
from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.reducer import Grid

SIDE = 12
TOKENS = SIDE * SIDE


def record(benchmark: Scenes, index: int, steps: tuple[StepReduction, ...], *, right: bool) -> Record:
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
        images=(ImageReduction(Grid(SIDE, SIDE), steps),),
    )


def tiled(*tiles: ImageReduction) -> Record:
    """A record of a sample of these tiles."""
    return Record("a", "b", "c", "d?", ("e",), answer="f", score=1.0, images=tiles)


def dropping(kept: range) -> tuple[StepReduction, ...]:
    source = tuple(kept.index(token) if token in kept else -1 for token in range(TOKENS))
    return (StepReduction("projector", tuple(kept), source),)


def pooling() -> tuple[StepReduction, ...]:
    source = tuple(token // SIDE // 2 * (SIDE // 2) + token % SIDE // 2 for token in range(TOKENS))
    return (StepReduction("projector", tuple(range(36)), source),)


def estimate(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, value - half, value + half)


def method(name: str, runs: int, score: float, kept: float, **knobs: Any) -> MethodResult:
    some = Spread(0.01, 0.009, 0.012)
    return MethodResult(
        name=name,
        knobs=knobs,
        runs=[f"{name}-{run:012x}" for run in range(runs)],
        errors=0,
        score=estimate(score),
        difference_to_unreduced=None if name == "none" else estimate(score - 0.9),
        difference_to_random=None,
        categories={name: CategoryResult(6, Estimate(score), None) for name in ("existence", "counting")},
        seed_scores=[score] * runs,
        agreement=1.0,
        changed=0.0,
        visual_tokens=VisualTokens(TOKENS, kept, kept, kept, kept),
        prefill_flops=PrefillFlops(llm=1e9, vision=5e8, llm_ratio=0.27, total_ratio=0.62),
        kv_bytes=300 << 10,
        time_to_first_token=FirstToken(0.0379, 0.03, 0.04, estimate(0.67), Parts(some, some, some)),
        decode_per_token=Timed(0.0052, 0.005, 0.006, estimate(0.98)),
        roofline=Roofline(Bound(10.0, False, 0.001), Bound(1.0, True, 0.002)),
        peak_memory=600 << 20,
        measures={},
        paper_flops_ratio=0.25,
    )


def result(folder: str, methods: dict[str, MethodResult], digest: str = "5f1c") -> Result:
    return Result(
        run=RunResult(digest, folder, {"model": {"class": "Llava"}, "batch_size": 32}),
        budget=None,
        benchmark=BenchmarkResult("scenes", 30, 6, {"existence": 6, "counting": 6}, 0, []),
        machine=None,
        methods=methods,
        settings=Settings(),
    )


EVIL = "<script>window.harmed = true</script><img src=x onerror='window.harmed = true'>"
"""What a model may answer; nothing may come of it."""


def write_sweep(folder: Path, benchmark: Scenes) -> Path:
    """Four comparisons, one broken and one unfinished run, as a sweep would leave them.

    ``best`` is right where ``index % 5``, ``other`` where ``index % 3``, the down-sampled one where ``index % 2``.
    """
    _write_run(folder / "none-0", [record(benchmark, index, (), right=True) for index in range(len(benchmark))])
    settings = (("best", 0.5, 5), ("best", 0.25, 5), ("other<b>", 0.5, 3), ("downsample", 0.5, 2))
    for number, (name, keep, every) in enumerate(settings):
        count = round(keep * TOKENS)
        steps = dropping(range(count))
        records = [record(benchmark, index, steps, right=index % every > 0) for index in range(len(benchmark))]
        if name == "best":
            records[0] = replace(records[0], answer=EVIL)
        _write_run(folder / f"{name[:4]}-{number}", records)
        for seed in range(2):
            drawn = [record(benchmark, index, steps, right=(index + seed) % 4 > 1) for index in range(len(benchmark))]
            _write_run(folder / f"random-{count}-{seed}", drawn)
        _write_result(folder / f"{name[:4]}-{number}", number, name, keep, count, every)
    (folder / "broken").mkdir()
    (folder / "broken" / "metrics.json").write_text("{")
    _write_run(folder / "unfinished", [record(benchmark, 0, (), right=True)])
    return folder


def _write_run(folder: Path, records: list[Record]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(each.line() for each in records), encoding="utf-8")


def _write_result(folder: Path, number: int, name: str, keep: float, count: int, every: int) -> None:
    plain = replace(method("none", 1, 1.0, TOKENS), runs=["none-0"])
    reduced = method(name, 1, 1 - 1 / every, count, keep=keep)
    lost = replace(reduced.categories["counting"], difference_to_unreduced=estimate(-1 / every))
    reduced = replace(
        reduced,
        runs=[folder.name],
        agreement=0.8,
        difference_to_random=estimate(0.5 - 1 / every),
        peak_memory=(500 + number) << 20,
        categories={**reduced.categories, "counting": lost},
    )
    random = replace(
        method("random", 2, 0.5, count, keep=count, seeds=2), runs=[f"random-{count}-{seed}" for seed in range(2)]
    )
    methods = {"unreduced": plain, "reducer": reduced, "random": random}
    result(folder.name, methods, f"{number:012x}").write(folder)
    (folder / "config.yaml").write_text("config: {model: {path: tiny}}\n", encoding="utf-8")
