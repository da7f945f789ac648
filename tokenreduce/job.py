"""One job: a comparison from its composed configuration to what is printed at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.configuration import SweepPlace, budget_of, knobs_of
from tokenreduce.evaluation import Comparer, Processes, Record, Result, Settings, TransformersBackend, read_records
from tokenreduce.evaluation.result import METRICS, MethodResult
from tokenreduce.models.loading import load
from tokenreduce.registry import BENCHMARKS, REDUCERS
from tokenreduce.reporting.formatting import label, tokens
from tokenreduce.reporting.pictures import KEPT_TOKENS, draw_kept_tokens
from tokenreduce.reporting.table import summary
from tokenreduce.reporting.terminal import TerminalProgress
from tokenreduce.reporting.tracking import Tracking, log_run

PLAIN_WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""


def run_job(config: DictConfig, processes: Processes, sweep: SweepPlace | None = None) -> Path:
    """Do what ``config`` asks for, as one of ``processes``, and return the folder of the reducer's run.

    As a job of a ``sweep`` it prints no tables, leaves the model in memory for the next one, and does nothing where the
    very same comparison was finished before.
    """
    console = Console(stderr=True, quiet=not processes.main)
    with processes.together():
        bench = _bench(config, processes, console, sweep)
        reducer = REDUCERS.create(config.reducer.name, **knobs_of(config.reducer, "reducer"))
        budget, tracking = budget_of(config.budget), tracking_of(config, sweep.folder if sweep else None)
        finished = bench.comparer.finished(reducer, budget) if sweep is not None else None
        if finished is None:
            bench.comparer.runner.rehearse(reducer)  # what cannot work fails here, not after the baseline
    if finished is not None:
        console.print("finished before, with the times measured then", highlight=False)
        return finished[0]
    if processes.main and (sweep is None or sweep.alone):
        with TerminalProgress(console) as progress:
            folder, result = bench.comparer.compare(reducer, budget=budget, config=_plain(config), progress=progress)
    else:
        folder, result = bench.comparer.compare(reducer, budget=budget, config=_plain(config))
    with processes.together():
        if processes.main:
            _present(config, bench.benchmark, folder, result, tracking, tables=sweep is None)
    return folder


def assigned_device(device: str, place: int | None, gpus: int) -> str:
    """The GPU of the process, or job, that has this ``place`` among those that share a machine's.

    >>> assigned_device("cuda", 5, gpus=4), assigned_device("cuda:2", 5, gpus=4), assigned_device("cuda", None, gpus=4)
    ('cuda:1', 'cuda:2', 'cuda')
    """
    return f"cuda:{place % gpus}" if device == "cuda" and place is not None and gpus else device


@dataclass(frozen=True)
class Bench:
    """A loaded model with the benchmark that it is asked, and all that they were made from."""

    made_from: str
    benchmark: Benchmark
    comparer: Comparer


_benches: list[Bench] = []
"""The one that the jobs of a sweep leave to each other in this process."""


def release() -> None:
    """Let go of what a sweep's jobs left to each other."""
    _benches.clear()


def _bench(config: DictConfig, processes: Processes, console: Console, sweep: SweepPlace | None) -> Bench:
    benchmark = BENCHMARKS.create(config.benchmark.name, **knobs_of(config.benchmark, "benchmark"))
    output = Path(config.output)
    settings = Settings(
        batch_size=config.runtime.batch_size,
        limit=config.benchmark.limit,
        max_new_tokens=config.benchmark.max_new_tokens,
        prompt=config.benchmark.prompt,
        random_seeds=config.evaluation.random_seeds,
        timing_pairs=config.evaluation.timing_pairs,
    )
    place = processes.local_index if processes.count > 1 else sweep.number if sweep and not sweep.alone else None
    device = assigned_device(config.runtime.device, place, torch.cuda.device_count())
    plain = _plain(config)
    parts = [plain[name] for name in ("model", "runtime", "benchmark", "evaluation", "output")]
    made_from = json.dumps([*parts, device], sort_keys=True)
    if _benches and _benches[0].made_from == made_from:
        return _benches[0]
    for place in range(min(len(benchmark), settings.limit or len(benchmark))):
        benchmark[place]  # a missing file, or an answer that cannot be scored, shows before a model is loaded
    _benches.clear()  # before the next model is loaded: there may be no room for two
    output.mkdir(parents=True, exist_ok=True)
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    console.print(f"loading   {config.model.path}", highlight=False)
    model, processor = load(
        config.model.path,
        revision=config.model.revision,
        device=device,
        dtype=config.model.dtype or config.runtime.dtype,
        attention=config.runtime.attention,
        device_map=config.runtime.device_map,
        compiler=config.runtime.compiler,
        do_pad=config.model.do_pad,
        image=plain["model"]["image"],
    )
    comparer = Comparer(TransformersBackend(model, processor), benchmark, output, settings, processes)
    bench = Bench(made_from, benchmark, comparer)
    if sweep is not None:
        _benches.append(bench)
    return bench


def _present(
    config: DictConfig, benchmark: Benchmark, folder: Path, result: Result, tracking: Tracking, tables: bool
) -> None:
    """Draw, print and log what was found."""
    reduced, unreduced = (_records(folder.parent, result, method) for method in (result.main, result.unreduced))
    draw_kept_tokens(
        benchmark,
        reduced,
        unreduced,
        folder / KEPT_TOKENS,
        name=config.reducer.name,
        title=_title(result.main),
        count=config.evaluation.pictures,
        padded=bool(config.model.do_pad),
    )
    if tables:
        show(result, folder)
    if (place := log_run(tracking, folder, _plain(config), result, reduced, unreduced)) and tables:
        print(f"{'W&B':<9} {place}")


def show(result: Result, folder: Path) -> None:
    """Print the tables, and where everything else is."""
    console = plain_console()
    console.print()
    console.print(summary(result))
    console.print()
    for name, place in (("results", folder / METRICS), ("picture", folder / KEPT_TOKENS)):
        if place.exists():
            print(f"{name:<9} {place}")


def plain_console() -> Console:
    """Standard output, as wide as tables need where it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def tracking_of(config: DictConfig, sweep: Path | None) -> Tracking:
    """Logging of a job, none where the group was taken out. What belongs to a sweep's folder is in one group, unless
    another is given."""
    tracking = Tracking(**_plain(config.tracking)) if "tracking" in config else Tracking(enabled=False)
    return replace(tracking, group=sweep.name) if sweep and tracking.group is None else tracking


def _records(output: Path, result: Result, method: MethodResult) -> list[Record]:
    return read_records(output / method.runs[0], limit=result.settings.limit)


def _title(method: MethodResult) -> str:
    kept, total = tokens(method.visual_tokens.kept), tokens(method.visual_tokens.total)
    return f"{label(method.name, method.knobs)}: {kept} of {total} visual tokens"


def _plain(node: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
