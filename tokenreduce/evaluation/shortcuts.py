"""Evaluate a reducer, or compare it, on a model of transformers in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.budget import Budget
from tokenreduce.evaluation.comparison import Comparer
from tokenreduce.evaluation.processes import Processes
from tokenreduce.evaluation.progress import Progress
from tokenreduce.evaluation.prompts import PLACE
from tokenreduce.evaluation.records import Record
from tokenreduce.evaluation.result import Result, Settings
from tokenreduce.evaluation.runner import ReducerFor, Runner
from tokenreduce.evaluation.transformers_backend import TransformersBackend
from tokenreduce.reducer import TokenReducer


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    benchmark: Benchmark,
    reducer: TokenReducer | ReducerFor,
    *,
    folder: Path | str,
    batch_size: int = 32,
    limit: int | None = None,
    max_new_tokens: int = 16,
    prompt: str = PLACE,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> list[Record]:
    """Answer the first ``limit`` samples, or all of them, and return their records in order.

    See :class:`~tokenreduce.evaluation.runner.Runner`, and its ``run`` for what happens to the ``folder``.
    """
    runner = Runner(
        TransformersBackend(model, processor),
        benchmark,
        batch_size=batch_size,
        limit=limit,
        max_new_tokens=max_new_tokens,
        prompt=prompt,
        progress=progress,
        processes=processes,
    )
    return runner.run(reducer, Path(folder))


def compare(
    model: PreTrainedModel,
    processor: Any,
    benchmark: Benchmark,
    reducer: TokenReducer,
    output: Path,
    settings: Settings,
    *,
    budget: Budget | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> tuple[Path, Result]:
    """Compare ``reducer`` with the unreduced model and with random selection.

    See :meth:`Comparer.compare <tokenreduce.evaluation.comparison.Comparer.compare>`.
    """
    comparer = Comparer(TransformersBackend(model, processor), benchmark, output, settings, processes)
    return comparer.compare(reducer, budget=budget, config=config, progress=progress)
