"""Compare reducers with the unreduced model and with chance: what the command does unless it names another tool."""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
import transformers
from omegaconf import DictConfig

from tokenreduce.configuration import (
    CONFIG_MODULE,
    CONFIG_NAME,
    SweepPlace,
    check_overrides,
    own_folder,
    register_plugins,
    sweep_folder,
    sweep_place,
)
from tokenreduce.evaluation import read_result
from tokenreduce.evaluation.processes import Processes, dismiss, launched
from tokenreduce.evaluation.result import METRICS
from tokenreduce.job import plain_console, release, run_job, tracking_of
from tokenreduce.messages import BAD_INPUT, SUCCESS, plain_warnings, refused, wants_everything
from tokenreduce.reporting.files import PAGE
from tokenreduce.reporting.html import write_report
from tokenreduce.reporting.table import overview
from tokenreduce.reporting.tracking import Tracking, log_report
from tokenreduce.sweep import Marks, Outcome, marks, outcomes_since, varied

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as clusters do when a job's time is over."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's own, and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with plain_warnings():
        processes = launched()
    try:
        with plain_warnings(processes.main), _reported(processes), _terminated_like_interrupted():
            _start(arguments, processes)
    except SystemExit as leaving:  # from below, or how Hydra ends after its own help or an error that it has reported
        return leaving.code if isinstance(leaving.code, int) else SUCCESS
    finally:
        dismiss()
    return SUCCESS


def job(config: DictConfig) -> None:
    """One job, in whatever process Hydra's launcher starts it."""
    transformers.utils.logging.disable_progress_bar()
    processes, sweep = launched(), sweep_place()
    if sweep is not None:
        _run_in_sweep(config, processes, sweep)
        return
    with _reported(processes):
        run_job(config, processes)


def _start(arguments: list[str], processes: Processes) -> None:
    """Check the arguments, and let Hydra run the job, or the jobs of a sweep."""
    register_plugins()
    config = check_overrides(
        [argument for argument in arguments if "=" in argument and not argument.startswith("-")], own_folder(arguments)
    )
    sweep = sweep_folder(arguments, config)
    before: Marks = {}
    if sweep is not None:
        if processes.count > 1 and not config.hydra.launcher._target_.endswith(".BasicLauncher"):
            raise ValueError("jobs of several processes each are run one after the other: use launcher=serial")
        before = marks(sweep)
        arguments = [*arguments, f"hydra.sweep.dir='{sweep}'"]
    entry = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(job)
    ended: SystemExit | None = None
    try:
        with _process_arguments(arguments):
            entry()
    except SystemExit as leaving:  # such as for a worker that was killed, which costs the other jobs nothing
        ended = leaving
    finally:
        release()
    failed = False
    if sweep is not None and processes.main:
        failed = _conclude(sweep, outcomes_since(sweep, before), tracking_of(config, sweep))
    if ended is not None:
        raise ended
    if failed:
        sys.exit(BAD_INPUT)


def _run_in_sweep(config: DictConfig, processes: Processes, sweep: SweepPlace) -> None:
    """One job of a sweep; its failure is told and written down, and costs no other."""
    name = f"job {sweep.number}: {' '.join(sweep.overrides)}"
    if processes.main:
        print(name, file=sys.stderr)
    started, folder, failure = time.monotonic(), None, None
    with plain_warnings(processes.main):
        try:
            folder = run_job(config, processes, sweep)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            if processes.main:
                print(f"error: {error}\n({name})", file=sys.stderr)
                if not isinstance(error, _USERS_ERRORS) or wants_everything():
                    traceback.print_exc()
    if processes.main:
        seconds = round(time.monotonic() - started, 1)
        name_of_run = None if folder is None else folder.name
        Outcome(sweep.number, sweep.overrides, name_of_run, failure, seconds).write(sweep.folder)


def _conclude(sweep: Path, outcomes: Sequence[Outcome], tracking: Tracking) -> bool:
    """Print what a sweep found, as far as it came; returns whether some job failed."""
    comparisons = [read_result(sweep.parent / outcome.run) for outcome in outcomes if outcome.run is not None]
    if comparisons:
        console = plain_console()
        console.print()
        console.print(overview(comparisons))
        console.print()
        _report(sweep, [sweep.parent / outcome.run for outcome in outcomes if outcome.run is not None], tracking)
    names = varied(outcomes)
    failures = [f"{names[each.number]}: {each.error}" for each in outcomes if each.error is not None]
    for failure in failures:
        print(f"{'failed':<9} {failure}", file=sys.stderr)
    if failures:
        print(f"{len(failures)} of {len(outcomes)} jobs failed; it cost the others nothing", file=sys.stderr)
    return bool(failures)


def _report(sweep: Path, runs: Sequence[Path], tracking: Tracking) -> None:
    """Write the sweep's report, unless one stands there that is newer than all results; it can cost no result."""
    page = sweep / "report" / PAGE
    if not page.exists() or any((run / METRICS).stat().st_mtime > page.stat().st_mtime for run in runs):
        try:
            write_report(runs, page.parent)
        except Exception as error:  # drawing may fail in any way; the results are on disk already
            print(f"warning: no report: {error} (tokenreduce report {sweep.parent})", file=sys.stderr)
            return
        log_report(tracking, page.parent)
    print(f"{'report':<9} {page}")


_USERS_ERRORS = (ValueError, TypeError, OSError)
"""Errors that a user can mend: reported in a few lines."""


@contextmanager
def _reported(processes: Processes) -> Iterator[None]:
    """Turn what a user can mend into a few lines on standard error and an exit status."""
    try:
        yield
    except _USERS_ERRORS as error:
        if wants_everything():
            raise
        if processes.main:
            refused(error)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt as interruption:
        if processes.main:
            print("\ninterrupted: the same command continues where this one stopped", file=sys.stderr)
        raise SystemExit(TERMINATED if isinstance(interruption, Terminated) else INTERRUPTED) from None


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end this process as cleanly as Ctrl-C does."""

    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only there can signals be caught
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _process_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads the process's arguments and takes no others."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
