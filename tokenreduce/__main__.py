"""``python -m tokenreduce``: compare a reducer with the unreduced model and with chance, from the command line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tokenreduce.attach import reduce_tokens
from tokenreduce.configuration import (
    CONFIG_MODULE,
    CONFIG_NAME,
    budget_of,
    check_overrides,
    knobs_of,
    register_plugins,
)
from tokenreduce.evaluation import Settings, compare, read_records
from tokenreduce.evaluation.comparison import REDUCER, UNREDUCED, Metrics
from tokenreduce.evaluation.run import Runner
from tokenreduce.models.loading import load
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import BENCHMARKS, REDUCERS
from tokenreduce.reporting.pictures import KEPT_TOKENS, draw_kept_tokens
from tokenreduce.reporting.table import label, report
from tokenreduce.reporting.terminal import TerminalProgress
from tokenreduce.reporting.tracking import Tracking, log_run

SUCCESS, BAD_INPUT, INTERRUPTED = 0, 2, 130
PLAIN_WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's own, and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    statuses: list[int] = []

    def job(config: DictConfig) -> None:
        with _reported(statuses):  # here, and not around everything, so that the other jobs of a sweep go on
            run(config)

    transformers.utils.logging.disable_progress_bar()
    entry = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(job)
    with _plain_warnings(), _reported(statuses):
        register_plugins()
        check_overrides([argument for argument in arguments if "=" in argument and not argument.startswith("-")])
        with _process_arguments(arguments):
            entry()
    return max(statuses, default=SUCCESS)


def run(config: DictConfig) -> None:
    """One comparison, from its composed configuration to what is printed at the end."""
    reducer = REDUCERS.create(config.reducer.name, **knobs_of(config.reducer, "reducer"))
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
    budget = budget_of(config.budget)
    tracking = Tracking(**_plain(config.tracking))
    settings.output.mkdir(parents=True, exist_ok=True)
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    console = Console(stderr=True)
    console.print(f"loading   {config.model.path}", highlight=False)
    model, processor = load(
        config.model.path,
        revision=config.model.revision,
        device=config.runtime.device,
        dtype=config.model.dtype or config.runtime.dtype,
        attention=config.runtime.attention,
        do_pad=config.model.do_pad,
    )
    _rehearse(Runner(model, processor, benchmark, limit=settings.limit, prompt=settings.prompt), reducer)
    with TerminalProgress(console) as progress:
        folder, metrics = compare(
            model, processor, benchmark, reducer, settings, budget=budget, config=_plain(config), progress=progress
        )
    reduced, unreduced = (_records(settings.output, metrics, method) for method in (REDUCER, UNREDUCED))
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
    show(metrics, folder)
    if place := log_run(tracking, folder, _plain(config), metrics, reduced, unreduced):
        print(f"{'W&B':<9} {place}")


def _rehearse(runner: Runner, reducer: TokenReducer) -> None:
    """One token of one answer: a reducer that cannot work on this model fails here, not after the baseline."""
    for place in range(runner.total):
        (sample,) = runner.prompts.samples(place, place + 1)
        try:
            runner.prompts.images(sample)
        except Exception:  # an unreadable image becomes a record with its error later; any other will do here
            continue
        with reduce_tokens(runner.model, reducer), torch.inference_mode():
            runner.model.generate(**runner.inputs([sample]), max_new_tokens=1, do_sample=False)
        return


def show(metrics: Metrics, folder: Path) -> None:
    """Print the tables, and where everything else is."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print()
    console.print(report(metrics))
    console.print()
    for name, place in (("results", folder / "metrics.json"), ("picture", folder / KEPT_TOKENS)):
        if place.exists():
            print(f"{name:<9} {place}")


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


@contextmanager
def _reported(statuses: list[int]) -> Iterator[None]:
    """Turn what a user can mend into a few lines on standard error and an exit status."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        statuses.append(BAD_INPUT)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues where this one stopped", file=sys.stderr)
        statuses.append(INTERRUPTED)
    except SystemExit as leaving:  # how Hydra ends after --help, and after an error that it has reported itself
        statuses.append(leaving.code if isinstance(leaving.code, int) else SUCCESS)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as its sentence: the place in the code says nothing to somebody at a terminal."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


@contextmanager
def _process_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads the process's arguments and takes no others."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
