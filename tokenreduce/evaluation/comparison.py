"""The whole comparison: a reducer beside the unreduced model and beside random selection at the same counts.

Every method's answers are a run of its own, found again by its content hash; the time to first token and the memory are
always measured anew, side by side. What comes out is a :class:`tokenreduce.evaluation.result.Result`, which needs no
model to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.budget import Budget, Solution
from tokenreduce.evaluation.aggregation import Aggregation
from tokenreduce.evaluation.backend import MeasuredBackend
from tokenreduce.evaluation.identity import content_hash, run_identity
from tokenreduce.evaluation.measurement import measure
from tokenreduce.evaluation.methods import MatchedRandom, Method, Run, share
from tokenreduce.evaluation.processes import Processes
from tokenreduce.evaluation.progress import Progress, Silent
from tokenreduce.evaluation.records import StorageError, storage, write_atomically
from tokenreduce.evaluation.result import (
    RANDOM,
    REDUCER,
    UNREDUCED,
    BudgetResult,
    Measured,
    Result,
    RunResult,
    Settings,
    read_result,
)
from tokenreduce.evaluation.runner import ReducerFor, Runner
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import REDUCERS, create

CONFIG = "config.yaml"

BUDGET_PROMPTS = 8
"""A budget is solved on the first so many images that can be read."""


class Comparer:
    """Compares reducers on one back end and benchmark, one after the other; they share what can be shared.

    ``output`` holds a folder for every run. Several ``processes`` that do this alike share the work; the main one
    measures and writes.
    """

    def __init__(
        self,
        backend: MeasuredBackend,
        benchmark: Benchmark,
        output: Path,
        settings: Settings,
        processes: Processes | None = None,
    ) -> None:
        self._backend, self._benchmark = backend, benchmark
        self._output, self._settings = output, settings
        self._processes = processes or Processes()
        self.runner = Runner(
            backend,
            benchmark,
            batch_size=settings.batch_size,
            limit=settings.limit,
            max_new_tokens=settings.max_new_tokens,
            prompt=settings.prompt,
            processes=self._processes,
        )
        self._samples = self.runner.samples()

    def compare(
        self,
        reducer: TokenReducer,
        *,
        budget: Budget | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Path, Result]:
        """Return the folder of the reducer's run, and the comparison's result, which ``metrics.json`` there holds too.

        ``config`` is whatever the caller wants to find again in ``config.yaml``. Runs that exist already are continued
        or reused. With a ``budget`` the reducer's own knob is set to meet it, and the run is the one of that setting.
        Raises ``ValueError`` when no sample could be answered by every method, and for a budget out of reach.
        """
        self.runner.progress = progress or Silent()
        solution = self._within(reducer, budget)
        methods = self._methods(reducer if solution is None else solution.reducer)
        main = methods.get(REDUCER, methods[UNREDUCED]).runs[0]
        with self._processes.together():
            if self._processes.main:
                result = self._result(main, methods, solution)
                if config is not None:
                    _write_config(main.folder, main.hash, main.identity, {"config": dict(config)})
                result.write(main.folder)
        return main.folder, read_result(main.folder)

    def finished(self, reducer: TokenReducer, budget: Budget | None = None) -> tuple[Path, Result] | None:
        """Return what :meth:`compare` returned for these very settings before; None if it has not been done."""
        solution = self._within(reducer, budget)
        folder, identity = self._place(reducer if solution is None else solution.reducer)
        try:
            result = read_result(folder)
        except StorageError:  # there is none, or one of another version, which is written anew
            return None
        baseline, _ = self._place(create("none"))
        same = result.run.identity == identity and result.settings == self._settings
        same = same and result.budget == _budget_result(solution) and list(result.unreduced.runs) == [baseline.name]
        return (folder, result) if same else None

    def _within(self, reducer: TokenReducer, budget: Budget | None) -> Solution | None:
        """The reducer at the setting that meets the budget, on the benchmark's first images."""
        if budget is None:
            return None
        prompts = self.runner.prompts
        first = {sample.image_id: sample for sample in reversed(self._samples)}.values()
        found = [prompts.prompt(sample) for sample in islice(prompts.readable(reversed(first)), BUDGET_PROMPTS)]
        if not found:
            raise ValueError(
                f"none of the {len(self._samples)} samples can be read, so no budget can be solved on them"
            )
        return self._backend.solve(reducer, budget, found)

    def _result(self, main: Run, methods: Mapping[str, Method], solution: Solution | None) -> Result:
        found = Aggregation(self._benchmark, self._samples, methods, self._backend.paper_flops)
        pairs = self._settings.timing_pairs
        measured = measure(self._backend, self.runner, methods, found.answered, pairs) if pairs else {}
        return Result(
            run=RunResult(main.hash, main.folder.name, main.identity),
            budget=_budget_result(solution),
            benchmark=found.benchmark(),
            machine=self._backend.limits() if measured else None,
            methods={key: found.method(key, measured.get(key, Measured())) for key in methods},
            settings=self._settings,
        )

    def _methods(self, reducer: TokenReducer) -> dict[str, Method]:
        """Every method with its records, the unreduced model first."""
        none = create("none")
        methods = {UNREDUCED: self._single(none, "unreduced")}
        if type(reducer) is not type(none):
            methods[REDUCER] = self._single(reducer, REDUCERS.name_of(reducer))
            if self._settings.random_seeds and (random := self._random(methods[REDUCER].runs[0])):
                methods[RANDOM] = random
        return methods

    def _single(self, reducer: TokenReducer, phase: str) -> Method:
        run = self._run(reducer, REDUCERS.name_of(reducer), phase, self._identity(reducer))
        return Method(REDUCERS.name_of(reducer), reducer.knobs(), [run], lambda _: reducer)

    def _random(self, reduced: Run) -> Method | None:
        """Random selection of as many tokens of each sample as the reducer kept, once a seed; None if it kept all."""
        shares = {record.id: share(record) for record in reduced.records.values() if record.error is None}
        kept = set(shares.values())
        if not kept or kept == {None}:
            return None
        seeds = range(self._settings.random_seeds if kept - {None, 0} else 1)
        matched = [MatchedRandom(shares, seed) for seed in seeds]
        runs = []
        for seed, plan in zip(seeds, matched, strict=True):
            phase = f"random {seed + 1} of {len(seeds)}" if len(seeds) > 1 else "random"
            same = plan.same
            name = REDUCERS.name_of(same or create("random"))
            random = self._identity(create("random", seed=seed))["reducer"]
            # Which counts were matched is told by the run that they came from: it stays true when a limit is raised.
            described = {**random, "knobs": {**random["knobs"], "keep": f"as in {reduced.hash}"}}
            runs.append(self._run(plan, name, phase, self._identity(same or described), share_vision=len(seeds) > 1))
        knobs = {"keep": next(iter(kept)) if len(kept) == 1 else "as the reducer", "seeds": len(seeds)}
        return Method("random", knobs, runs, matched[0])

    def _run(
        self,
        reducer: TokenReducer | ReducerFor,
        name: str,
        phase: str,
        identity: Mapping[str, Any],
        share_vision: bool = False,
    ) -> Run:
        digest = content_hash(identity)
        folder = self._output / f"{name}-{digest}"
        with self._processes.together():
            if self._processes.main:
                _write_config(folder, digest, identity, overwrite=False)
        records = self.runner.run(reducer, folder, phase, share_vision=share_vision)
        return Run(folder, digest, identity, {record.id: record for record in records})

    def _place(self, reducer: TokenReducer) -> tuple[Path, dict[str, Any]]:
        """The folder of a reducer's run, and its identity."""
        identity = self._identity(reducer)
        return self._output / f"{REDUCERS.name_of(reducer)}-{content_hash(identity)}", identity

    def _identity(self, reducer: TokenReducer | Mapping[str, Any]) -> dict[str, Any]:
        return run_identity(
            self._backend.identity(),
            self._benchmark,
            reducer,
            batch_size=self._settings.batch_size,
            max_new_tokens=self._settings.max_new_tokens,
            prompt=self._settings.prompt,
        )


def _budget_result(solution: Solution | None) -> BudgetResult | None:
    if solution is None:
        return None
    return BudgetResult(
        currency=solution.budget.currency,
        value=solution.budget.value,
        asked=solution.asked,
        expected=solution.expected,
        least=solution.least,
        most=solution.most,
        whole=solution.whole,
    )


def _write_config(
    folder: Path,
    digest: str,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    path = folder / CONFIG
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if overwrite or not path.exists():
        content = {"hash": digest, "identity": dict(identity), **(extra or {})}
        write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(content)))
