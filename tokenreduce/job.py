"""One job: a comparison from its composed configuration to what is printed at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tokenreduce.attach import reduce_tokens
from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.configuration import SweepPlace, budget_of, knobs_of
from tokenreduce.evaluation import Comparer, Processes, Settings, read_records
from tokenreduce.evaluation.comparison import REDUCER, UNREDUCED, Metrics
from tokenreduce.evaluation.runner import Runner
from tokenreduce.models.loading import load
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import BENCHMARKS, REDUCERS
from tokenreduce.reporting.pictures import KEPT_TOKENS, draw_kept_tokens
from tokenreduce.reporting.table import label, summary
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
            _rehearse(bench.comparer.runner, reducer)
    if finished is not None:
        console.print("finished before; its times are those of then", highlight=False)
        return finished[0]
    if processes.main and (sweep is None or sweep.alone):
        with TerminalProgress(console) as progress:
            folder, metrics = bench.comparer.compare(reducer, budget=budget, config=_plain(config), progress=progress)
    else:
        folder, metrics = bench.comparer.compare(reducer, budget=budget, config=_plain(config))
    with processes.together():
        if processes.main:
            _present(config, bench.benchmark, folder, metrics, tracking, tables=sweep is None)
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
    settings = Settings(
        output=Path(config.output),
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
    settings.output.mkdir(parents=True, exist_ok=True)
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
    bench = Bench(made_from, benchmark, Comparer(model, processor, benchmark, settings, processes))
    if sweep is not None:
        _benches.append(bench)
    return bench


def _rehearse(runner: Runner, reducer: TokenReducer) -> None:
    """One token of one answer: a reducer that cannot work on this model fails here, not after the baseline."""
    for place in range(runner.total):
        (sample,) = runner.prompts.samples(place, place + 1)
        try:
            runner.prompts.images(sample)
        except Exception:  # an unreadable image becomes a record with its error later; any other will do here
            continue
        inputs = runner.inputs([sample])  # outside of inference mode: they are kept, and used without it
        with reduce_tokens(runner.model, reducer, question=sample.question), torch.inference_mode():
            runner.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return


def _present(
    config: DictConfig, benchmark: Benchmark, folder: Path, metrics: Metrics, tracking: Tracking, tables: bool
) -> None:
    """Draw, print and log what was found."""
    reduced, unreduced = (_records(folder.parent, metrics, method) for method in (REDUCER, UNREDUCED))
    draw_kept_tokens(
        benchmark,
        reduced,
        unreduced,
        folder / KEPT_TOKENS,
        name=config.reducer.name,
        title=_title(metrics),
        count=config.evaluation.pictures,
        padded=bool(config.model.do_pad),
    )
    if tables:
        show(metrics, folder)
    if (place := log_run(tracking, folder, _plain(config), metrics, reduced, unreduced)) and tables:
        print(f"{'W&B':<9} {place}")


def show(metrics: Metrics, folder: Path) -> None:
    """Print the tables, and where everything else is."""
    console = plain_console()
    console.print()
    console.print(summary(metrics))
    console.print()
    for name, place in (("results", folder / "metrics.json"), ("picture", folder / KEPT_TOKENS)):
        if place.exists():
            print(f"{name:<9} {place}")


def plain_console() -> Console:
    """Standard output, as wide as tables need where it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def tracking_of(config: DictConfig, sweep: Path | None) -> Tracking:
    """Where a job is logged: all that belongs to a sweep's folder in one group, unless another is given."""
    tracking = Tracking(**_plain(config.tracking))
    return replace(tracking, group=sweep.name) if sweep and tracking.group is None else tracking


def _records(output: Path, metrics: Metrics, method: str) -> list[Any]:
    """One method's records; the unreduced model's where a comparison is of nothing else."""
    run_folder = metrics["methods"].get(method, metrics["methods"][UNREDUCED])["runs"][0]
    return read_records(output / run_folder, limit=metrics["settings"]["limit"])


def _title(metrics: Metrics) -> str:
    method = metrics["methods"].get(REDUCER, metrics["methods"][UNREDUCED])
    tokens = method["visual_tokens"]
    return f"{label(method)}: {tokens['kept']:.4g} of {tokens['total']:.4g} visual tokens"


def _plain(node: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
