"""The whole comparison: a reducer beside the unreduced model and beside random selection at the same counts.

Every method's answers are a run of its own, found again by its content hash; the time to first token and the memory are
always measured anew, side by side. The result is ``metrics.json``, which needs no model to be read:

- ``run``: the reducer's ``hash``, ``folder`` and ``identity``; ``settings``: those of the comparison.
- ``budget``: None, or the ``currency`` and ``value`` that the reducer was held to, what was ``asked`` in the currency's
  unit, what was ``expected`` of the knob that was found, the ``least`` and ``most`` that was possible, and what the
  ``whole`` model costs. What was really spent stands with the methods.
- ``machine``: how many ``flops`` and ``bytes`` a second this one was measured to do, and ``break_even_tokens``, the
  length of a prompt below which prefill at batch 1 only waits for the weights. A method's ``roofline`` is the least
  time that ``prefill`` and ``decode`` of a token can take on it, and whether they are memory-bound.
- ``benchmark``: its ``name``, how many ``samples`` of how many ``images`` every method answered (only these are
  compared), by ``categories``; ``errors`` counts the others and ``failed`` lists them.
- ``methods``: one row each for ``unreduced``, ``reducer`` and ``random``, in this order. The second is absent where the
  reducer is ``none``, the third where nothing was dropped or no draws were asked for. An estimate is ``value``, ``low``
  and ``high``; a time is a ``median`` with the 10 % and 90 % quantiles ``low`` and ``high``, its ``ratio`` to the
  unreduced model's an estimate, and that to the first token has ``parts``: ``vision``, ``selection``, ``llm``. Counts,
  FLOPs and bytes are means over samples, times are seconds. ``paper_flops_ratio`` is what papers print: prefill FLOPs
  by FastV's formula, without the text. ``measures`` are the benchmark's own figures of all answers together, by name,
  in its units.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.budget import Budget, Solution
from tokenreduce.evaluation import statistics
from tokenreduce.evaluation.clock import TIMES, attached, peak_memory, take_times
from tokenreduce.evaluation.clock import ReducerFor as ReducerForPrompt
from tokenreduce.evaluation.costs import within_budget
from tokenreduce.evaluation.identity import content_hash, run_identity
from tokenreduce.evaluation.processes import Processes
from tokenreduce.evaluation.progress import Progress, Silent
from tokenreduce.evaluation.prompts import PLACE
from tokenreduce.evaluation.records import Record, StorageError, storage, write_atomically
from tokenreduce.evaluation.roofline import limits, roofline
from tokenreduce.evaluation.runner import ReducerFor, Runner
from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.flops import paper_flops
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import BENCHMARKS, REDUCERS, create

METRICS = "metrics.json"
METRICS_SCHEMA = 1
CONFIG = "config.yaml"

UNREDUCED, REDUCER, RANDOM = "unreduced", "reducer", "random"
"""The methods of a comparison, as ``metrics["methods"]`` names them."""

BUDGET_PROMPTS = 8
"""A budget is solved on the first so many images that can be read."""

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a comparison is run. ``output`` holds a folder for every run; ``limit`` takes the first samples only.

    random_seeds: draws of the random baseline; 0 leaves it out.
    timing_pairs: how often each method is timed; 0 leaves times and memory out.
    """

    output: Path
    batch_size: int = 32
    limit: int | None = None
    max_new_tokens: int = 16
    prompt: str = PLACE
    random_seeds: int = 5
    timing_pairs: int = 30

    def __post_init__(self) -> None:
        for name in ("random_seeds", "timing_pairs"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value} is negative; 0 leaves it out")

    def described(self) -> dict[str, Any]:
        """All but the place, which says nothing about the results."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


@dataclass(frozen=True)
class Run:
    """One run's folder and records by sample id."""

    folder: Path
    hash: str
    identity: Mapping[str, Any]
    records: Mapping[str, Record]


@dataclass(frozen=True)
class Method:
    """A row of the comparison: one run, or several that differ by seed and are averaged sample by sample."""

    name: str
    knobs: Mapping[str, Any]
    runs: Sequence[Run]
    reducer_for: ReducerFor

    def mean(self, ids: Sequence[str], value: Callable[[Record], float]) -> list[float]:
        """The mean over runs of ``value``, by sample."""
        return [sum(value(run.records[each]) for run in self.runs) / len(self.runs) for each in ids]


def compare(
    model: PreTrainedModel,
    processor: Any,
    benchmark: Benchmark,
    reducer: TokenReducer,
    settings: Settings,
    *,
    budget: Budget | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> tuple[Path, Metrics]:
    """Compare ``reducer`` with the unreduced model and with random selection; see :meth:`Comparer.compare`."""
    return Comparer(model, processor, benchmark, settings, processes).compare(
        reducer, budget=budget, config=config, progress=progress
    )


def read_metrics(folder: Path | str) -> Metrics:
    """A finished comparison. Raises ``StorageError`` where there is none, or a newer version's."""
    path = Path(folder) / METRICS
    with storage(path, "read"):
        text = path.read_text(encoding="utf-8")
    metrics: Metrics = json.loads(text)
    if metrics.get("schema") != METRICS_SCHEMA:
        raise StorageError(
            f"{path} has schema {metrics.get('schema')}; this version of tokenreduce reads {METRICS_SCHEMA}"
        )
    return metrics


class Comparer:
    """Compares reducers on one model and benchmark, one after the other; they share what can be shared.

    Several ``processes`` that do this alike share the work; the main one measures and writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        benchmark: Benchmark,
        settings: Settings,
        processes: Processes | None = None,
    ) -> None:
        self._model, self._processor, self._benchmark = model, processor, benchmark
        self._settings = settings
        self._processes = processes or Processes()
        self.runner = Runner(
            model,
            processor,
            benchmark,
            batch_size=settings.batch_size,
            limit=settings.limit,
            max_new_tokens=settings.max_new_tokens,
            prompt=settings.prompt,
            processes=self._processes,
        )
        self._by_id = {sample.id: sample for sample in self.runner.samples()}

    def compare(
        self,
        reducer: TokenReducer,
        *,
        budget: Budget | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Path, Metrics]:
        """The folder of the reducer's run, and the comparison's metrics, which ``metrics.json`` there holds as well.

        ``config`` is whatever the caller wants to find again in ``config.yaml``. Runs that exist already are continued
        or reused. With a ``budget`` the reducer's own knob is set to meet it, and the run is the one of that setting.
        Raises ``ValueError`` when no sample could be answered by every method, and for a budget out of reach.
        """
        self.runner.progress = progress or Silent()
        solution = self._within(reducer, budget)
        reducer = reducer if solution is None else solution.reducer
        methods = self._methods(reducer)
        main = methods.get(REDUCER, methods[UNREDUCED]).runs[0]
        with self._processes.together():
            if self._processes.main:
                self._write(main, methods, config, solution)
        return main.folder, read_metrics(main.folder)

    def finished(self, reducer: TokenReducer, budget: Budget | None = None) -> tuple[Path, Metrics] | None:
        """What :meth:`compare` gave when it was done before with these very settings; None if it was not."""
        solution = self._within(reducer, budget)
        reducer = reducer if solution is None else solution.reducer
        folder, identity = self._place(reducer)
        if not (folder / METRICS).exists():
            return None
        metrics = read_metrics(folder)
        baseline, _ = self._place(create("none"))
        same = metrics["run"]["identity"] == identity and metrics["settings"] == self._settings.described()
        same = same and metrics.get("budget") == _spent(solution)
        return (folder, metrics) if same and metrics["methods"][UNREDUCED]["runs"] == [baseline.name] else None

    def _within(self, reducer: TokenReducer, budget: Budget | None) -> Solution | None:
        """The reducer at the setting that meets the budget, on the benchmark's first images."""
        if budget is None:
            return None
        prompts = self.runner.prompts
        first = {sample.image_id: sample for sample in reversed(self._by_id.values())}.values()
        readable = (sample for sample in reversed(first) if prompts.unreadable(sample) is None)
        inputs = [self.runner.inputs([sample]) for sample in islice(readable, BUDGET_PROMPTS)]
        if not inputs:
            raise ValueError(f"none of the {len(self._by_id)} samples can be read, so no budget can be solved on them")
        return within_budget(self._model, reducer, budget, inputs)

    def _write(
        self,
        main: Run,
        methods: Mapping[str, Method],
        config: Mapping[str, Any] | None,
        solution: Solution | None,
    ) -> None:
        measured = self.measured(methods)
        metrics = {
            "schema": METRICS_SCHEMA,
            "run": {"hash": main.hash, "folder": main.folder.name, "identity": main.identity},
            "budget": _spent(solution),
            "benchmark": self.describe_benchmark(methods),
            "machine": asdict(limits(self._model)) if measured else None,
            "methods": {
                key: _row(key, methods, self.answered(methods), measured.get(key, {}))
                | {"measures": self._measures(key, methods), "paper_flops_ratio": self._paper_ratio(key, methods)}
                for key in methods
            },
            "settings": self._settings.described(),
        }
        if config is not None:
            _write_config(main.folder, main.hash, main.identity, {"config": dict(config)})
        text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(main.folder / METRICS, text)

    def _methods(self, reducer: TokenReducer) -> dict[str, Method]:
        """Every method with its records, the unreduced model first."""
        none = create("none")
        methods = {UNREDUCED: self._single(none, "unreduced")}
        if type(reducer) is not type(none):
            methods[REDUCER] = self._single(reducer, REDUCERS.name_of(reducer))
            if self._settings.random_seeds and (random := self._random(methods[REDUCER].runs[0])):
                methods[RANDOM] = random
        return methods

    def answered(self, methods: Mapping[str, Method]) -> list[Sample]:
        """The samples that every run answered: only these are compared."""
        runs = [run for method in methods.values() for run in method.runs]
        return [sample for sample in self._by_id.values() if all(run.records[sample.id].error is None for run in runs)]

    def describe_benchmark(self, methods: Mapping[str, Method]) -> dict[str, Any]:
        """What was asked, and what could not be answered."""
        failed = [
            {"id": record.id, "method": key, "error": record.error}
            for key, method in methods.items()
            for run in method.runs
            for record in run.records.values()
            if record.error is not None
        ]
        answered = self.answered(methods)
        if not answered:
            first = failed[0]
            raise ValueError(
                f"none of the {len(self._by_id)} samples was answered by every method; "
                f"the first error was at {first['id']!r}: {first['error']}"
            )
        return {
            "name": self._benchmark.title() or BENCHMARKS.name_of(self._benchmark),
            "samples": len(answered),
            "images": len({sample.image_id for sample in answered}),
            "categories": dict(Counter(sample.category for sample in answered)),
            "errors": len(self._by_id) - len(answered),
            "failed": list({failure["id"]: failure for failure in failed}.values()),
        }

    def _measures(self, key: str, methods: Mapping[str, Method]) -> dict[str, Any]:
        """What the benchmark computes of all answers together, and its difference to the unreduced model's."""
        answered = self.answered(methods)

        def of(method: Method, samples: Sequence[Sample]) -> dict[str, float]:
            answers = [[run.records[sample.id].answer or "" for sample in samples] for run in method.runs]
            each = [self._benchmark.measures(given, samples) for given in answers]
            return {name: sum(run[name] for run in each) / len(each) for name in each[0]}

        def figures(places: Sequence[int]) -> dict[tuple[str, bool], float]:
            samples = [answered[place] for place in places]
            now, before = of(methods[key], samples), of(methods[UNREDUCED], samples)
            values = {(name, False): value for name, value in now.items()}
            return values | {(name, True): value - before[name] for name, value in now.items()}

        estimates = statistics.jackknife(figures, [sample.image_id for sample in answered])
        return {
            name: asdict(estimate)
            | {"difference_to_unreduced": None if key == UNREDUCED else asdict(estimates[name, True])}
            for (name, difference), estimate in estimates.items()
            if not difference
        }

    def _paper_ratio(self, key: str, methods: Mapping[str, Method]) -> float:
        """Prefill FLOPs relative to the unreduced model's in the way of FastV's paper, which leaves out the text."""
        ids, config = [sample.id for sample in self.answered(methods)], self._model.config.get_text_config()

        def visual(record: Record) -> float:
            text = record.lengths[0] - (record.entering or 0)
            return paper_flops([length - text for length in record.lengths], config)

        return sum(methods[key].mean(ids, visual)) / sum(methods[UNREDUCED].mean(ids, visual))

    def measured(self, methods: Mapping[str, Method]) -> dict[str, dict[str, Any]]:
        """What must be taken now, and on this machine, of every method: times, and what they could be at best; peak
        memory."""
        answered, pairs = self.answered(methods), self._settings.timing_pairs
        if not pairs or not answered:
            return {}
        runner = self.runner
        # One question an image: as many different pictures as there are.
        timed = list({sample.image_id: sample for sample in reversed(answered)}.values())[::-1][:pairs]
        prompts = [runner.inputs([sample]) for sample in timed]
        by_prompt: dict[str, ReducerForPrompt] = {
            key: partial(_reducer_at, None if key == UNREDUCED else method.reducer_for, [sample.id for sample in timed])
            for key, method in methods.items()
        }
        runner.progress.start("timing", pairs)
        try:
            asked = [sample.question for sample in timed]
            times = take_times(self._model, by_prompt, prompts, pairs, runner.progress.advance, asked)
        finally:
            runner.progress.finish()
        runner.forget()
        batch = answered[: runner.fitting]
        inputs, asked = runner.inputs(batch), [sample.question for sample in batch]
        memory: dict[str, int | None] = {}
        for key, method in methods.items():
            first, *others = (None if key == UNREDUCED else method.reducer_for(sample.id) for sample in batch)
            # A random baseline whose counts differ by sample does not run as one batch, so it has no comparable peak.
            if all(other == first for other in others):
                with attached(self._model, first, asked):
                    memory[key] = peak_memory(self._model.device, partial(runner.generate, inputs))
        bounds = {}
        for key, method in methods.items():
            flops, kv_bytes = (
                sum(method.mean([sample.id for sample in answered], partial(_number, field))) / len(answered)
                for field in ("llm_flops", "kv_bytes")
            )
            bounds[key] = asdict(roofline(self._model, flops, kv_bytes))
        return {key: {**asdict(times[key]), "roofline": bounds[key], "peak_memory": memory.get(key)} for key in methods}

    def _single(self, reducer: TokenReducer, phase: str) -> Method:
        run = self._run(reducer, REDUCERS.name_of(reducer), phase, self._identity(reducer))
        return Method(REDUCERS.name_of(reducer), reducer.knobs(), [run], lambda _: reducer)

    def _random(self, reduced: Run) -> Method | None:
        """Random selection of as many tokens of each sample as the reducer kept, once a seed; None if it kept all."""
        counts = {record.id: _share(record) for record in reduced.records.values() if record.error is None}
        kept = set(counts.values())
        if not kept or kept == {None}:
            return None
        seeds = range(self._settings.random_seeds if kept - {None, 0} else 1)
        matched = [_Matched(counts, seed) for seed in seeds]
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
        folder = self._settings.output / f"{name}-{digest}"
        with self._processes.together():
            if self._processes.main:
                _write_config(folder, digest, identity, overwrite=False)
        records = self.runner.run(reducer, folder, phase, share_vision=share_vision)
        return Run(folder, digest, identity, {record.id: record for record in records})

    def _place(self, reducer: TokenReducer) -> tuple[Path, dict[str, Any]]:
        """The folder of a reducer's run, and its identity."""
        identity = self._identity(reducer)
        return self._settings.output / f"{REDUCERS.name_of(reducer)}-{content_hash(identity)}", identity

    def _identity(self, reducer: TokenReducer | Mapping[str, Any]) -> dict[str, Any]:
        return run_identity(
            self._model,
            self._processor,
            self._benchmark,
            reducer,
            batch_size=self._settings.batch_size,
            max_new_tokens=self._settings.max_new_tokens,
            prompt=self._settings.prompt,
        )


class _Matched:
    """For each sample the random reducer that keeps its share (see :func:`_share`)."""

    def __init__(self, shares: Mapping[str, int | float | None], seed: int) -> None:
        self._shares = shares
        self._reducers: dict[int | float | None, TokenReducer] = {
            share: _random_reducer(share, seed) for share in set(shares.values())
        }

    def __call__(self, sample: str) -> TokenReducer:
        if self.same or sample not in self._shares:  # one that the reducer failed at: it is in no comparison
            return self.same or create("none")
        return self._reducers[self._shares[sample]]

    @property
    def same(self) -> TokenReducer | None:
        """The reducer of all samples, where it is one."""
        return next(iter(self._reducers.values())) if len(self._reducers) == 1 else None


def _random_reducer(share: int | float | None, seed: int) -> TokenReducer:
    if share is None:
        return create("none")
    return create("random", keep=share, seed=seed) if share else create("no_image")


def _share(record: Record) -> int | float | None:
    """What random selection has to keep of a sample: a count an image, or a ratio where images differ; None is all."""
    total, mean = record.visual_tokens or 0, record.layer_mean or 0.0
    # What is dropped inside the language model costs until then: random selection gets the same mean over layers.
    kept = max(1, round(mean)) if mean else 0
    if kept >= total:
        return None
    if len(record.images) <= 1 or not kept:
        return kept
    each, rest = divmod(kept, len(record.images))
    return each if not rest and len({image.grid for image in record.images}) == 1 else kept / total


def _reducer_at(reducer_for: ReducerFor | None, ids: Sequence[str], place: int) -> TokenReducer | None:
    return None if reducer_for is None else reducer_for(ids[place])


def _spent(solution: Solution | None) -> dict[str, Any] | None:
    """A budget as plain data: what was wanted, and what the knob that was found should cost."""
    if solution is None:
        return None
    figures = {name: getattr(solution, name) for name in ("asked", "expected", "least", "most", "whole")}
    return {**asdict(solution.budget), **figures}


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


def _row(
    key: str,
    methods: Mapping[str, Method],
    answered: Sequence[Sample],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """One method's figures, over the samples that every method answered."""
    method, base = methods[key], methods[UNREDUCED]
    ids = [sample.id for sample in answered]
    images = [sample.image_id for sample in answered]
    scores = method.mean(ids, _score)
    unreduced = base.runs[0].records
    agreement = method.mean(ids, lambda record: record.answer == unreduced[record.id].answer)
    totals = {field: sum(method.mean(ids, partial(_number, field))) for field in _COSTS}
    whole = {field: sum(base.mean(ids, partial(_number, field))) for field in _COSTS}
    counts = [_number("entering", run.records[each]) for run in method.runs for each in ids]
    per_sample = {field: total / len(ids) for field, total in totals.items()}
    return {
        "name": method.name,
        "knobs": dict(method.knobs),
        "runs": [run.folder.name for run in method.runs],
        "errors": sum(record.error is not None for run in method.runs for record in run.records.values()),
        "score": _plain(statistics.score(scores, images)),
        "difference_to_unreduced": None if key == UNREDUCED else _difference(method, base, ids, images),
        "difference_to_random": _difference(method, methods[RANDOM], ids, images)
        if key == REDUCER and RANDOM in methods
        else None,
        "categories": {
            category: _category(method, base, [sample for sample in answered if sample.category == category], key)
            for category in dict.fromkeys(sample.category for sample in answered)
        },
        "seed_scores": [sum(_score(run.records[each]) for each in ids) / len(ids) for run in method.runs],
        "agreement": sum(agreement) / len(ids),
        "changed": len(ids) - sum(agreement),
        "visual_tokens": {
            "total": per_sample["visual_tokens"],
            "kept": per_sample["entering"],
            "fewest": min(counts),
            "most": max(counts),
            "layer_mean": per_sample["layer_mean"],
        },
        "prefill_flops": {
            "llm": per_sample["llm_flops"],
            "vision": per_sample["vision_flops"],
            "llm_ratio": totals["llm_flops"] / whole["llm_flops"],
            "total_ratio": (totals["llm_flops"] + totals["vision_flops"])
            / (whole["llm_flops"] + whole["vision_flops"]),
        },
        "kv_bytes": per_sample["kv_bytes"],
        **{name: measured.get(name) for name in (*TIMES, "roofline", "peak_memory")},
    }


_COSTS = ("visual_tokens", "entering", "layer_mean", "llm_flops", "vision_flops", "kv_bytes")


def _category(method: Method, base: Method, samples: Sequence[Sample], key: str) -> dict[str, Any]:
    ids, images = [sample.id for sample in samples], [sample.image_id for sample in samples]
    return {
        "samples": len(ids),
        "score": _plain(statistics.score(method.mean(ids, _score), images)),
        "difference_to_unreduced": None if key == UNREDUCED else _difference(method, base, ids, images),
    }


def _difference(method: Method, other: Method, ids: Sequence[str], images: Sequence[str]) -> dict[str, Any] | None:
    return _plain(statistics.difference(method.mean(ids, _score), other.mean(ids, _score), images))


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)


def _score(record: Record) -> float:
    return _number("score", record)


def _number(field: str, record: Record) -> float:
    value = getattr(record, field)
    if value is None:
        raise ValueError(
            f"the record of {record.id!r} has no {field}, though it has no error either: delete its run's folder"
        )
    return float(value)
