"""From the records of a comparison's methods to its result: scores, differences and costs, over the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.evaluation import statistics
from tokenreduce.evaluation.methods import Method, Run, number
from tokenreduce.evaluation.records import Record
from tokenreduce.evaluation.result import (
    RANDOM,
    REDUCER,
    UNREDUCED,
    BenchmarkResult,
    CategoryResult,
    Failure,
    Measure,
    Measured,
    MethodResult,
    PrefillFlops,
    VisualTokens,
)
from tokenreduce.evaluation.statistics import Estimate
from tokenreduce.registry import BENCHMARKS


class Aggregation:
    """The figures of methods by their records, over the samples that every one of them answered.

    ``paper_flops`` counts FLOPs of a prefill by its lengths, as papers do. Raises ``ValueError`` where there is no
    sample that every method answered.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        samples: Sequence[Sample],
        methods: Mapping[str, Method],
        paper_flops: Callable[[Sequence[int]], float],
    ) -> None:
        self._benchmark, self._samples, self._methods = benchmark, samples, methods
        self._paper_flops = paper_flops
        runs = [run for method in methods.values() for run in method.runs]
        self.answered = [each for each in samples if all(run.records[each.id].error is None for run in runs)]
        if not self.answered:
            first = self._failures()[0]
            raise ValueError(
                f"none of the {len(samples)} samples was answered by every method; "
                f"the first error was at {first.id!r}: {first.error}"
            )

    def benchmark(self) -> BenchmarkResult:
        """The samples that are compared, and those that could not be answered."""
        return BenchmarkResult(
            name=self._benchmark.title() or BENCHMARKS.name_of(self._benchmark),
            samples=len(self.answered),
            images=len(set(_images(self.answered))),
            categories=dict(Counter(sample.category for sample in self.answered)),
            errors=len(self._samples) - len(self.answered),
            failed=tuple({failure.id: failure for failure in self._failures()}.values()),
        )

    def method(self, key: str, measured: Measured) -> MethodResult:
        """One method's figures."""
        method, base = self._methods[key], self._methods[UNREDUCED]
        samples, ids = self.answered, [sample.id for sample in self.answered]
        plain = base.runs[0].records
        agreement = sum(method.mean(ids, lambda record: record.answer == plain[record.id].answer))
        entering = [number("entering", run.records[each]) for run in method.runs for each in ids]
        categories = dict.fromkeys(sample.category for sample in samples)

        def mean(field: str) -> float:
            return sum(method.numbers(ids, field)) / len(ids)

        return MethodResult(
            name=method.name,
            knobs=dict(method.knobs),
            runs=tuple(run.folder.name for run in method.runs),
            errors=sum(record.error is not None for run in method.runs for record in run.records.values()),
            score=_score(method, samples),
            difference_to_unreduced=self._difference(key, UNREDUCED, samples),
            difference_to_random=self._difference(key, RANDOM, samples) if key == REDUCER else None,
            categories={name: self._category(key, name) for name in categories},
            seed_scores=tuple(_mean_score(run, ids) for run in method.runs),
            agreement=agreement / len(ids),
            changed=len(ids) - agreement,
            visual_tokens=VisualTokens(
                total=mean("visual_tokens"),
                kept=mean("entering"),
                fewest=min(entering),
                most=max(entering),
                layer_mean=mean("layer_mean"),
            ),
            prefill_flops=PrefillFlops(
                llm=mean("llm_flops"),
                vision=mean("vision_flops"),
                llm_ratio=self._ratio(method, ids, "llm_flops"),
                total_ratio=self._ratio(method, ids, "llm_flops", "vision_flops"),
            ),
            kv_bytes=mean("kv_bytes"),
            measures=self._measures(key),
            paper_flops_ratio=self._paper_ratio(key),
            **vars(measured),
        )

    def _failures(self) -> list[Failure]:
        return [
            Failure(record.id, key, record.error)
            for key, method in self._methods.items()
            for run in method.runs
            for record in run.records.values()
            if record.error is not None
        ]

    def _category(self, key: str, category: str) -> CategoryResult:
        samples = [sample for sample in self.answered if sample.category == category]
        score = _score(self._methods[key], samples)
        return CategoryResult(len(samples), score, self._difference(key, UNREDUCED, samples))

    def _difference(self, key: str, other: str, samples: Sequence[Sample]) -> Estimate | None:
        """The difference of scores to another method's; None where there is no other method."""
        if key == other or other not in self._methods:
            return None
        ids = [sample.id for sample in samples]
        now, before = (self._methods[each].numbers(ids, "score") for each in (key, other))
        return statistics.difference(now, before, _images(samples))

    def _ratio(self, method: Method, ids: Sequence[str], *fields: str) -> float:
        """The sum of costs relative to the unreduced model's."""
        spent, whole = (
            sum(sum(each.numbers(ids, field)) for field in fields) for each in (method, self._methods[UNREDUCED])
        )
        return spent / whole

    def _measures(self, key: str) -> dict[str, Measure]:
        """The benchmark's own figures of all answers together, and their differences to the unreduced model's."""

        def of(method: Method, samples: Sequence[Sample]) -> dict[str, float]:
            answers = [[run.records[sample.id].answer or "" for sample in samples] for run in method.runs]
            each = [self._benchmark.measures(given, samples) for given in answers]
            return {name: sum(run[name] for run in each) / len(each) for name in each[0]}

        def figures(places: Sequence[int]) -> dict[tuple[str, bool], float]:
            samples = [self.answered[place] for place in places]
            now, before = of(self._methods[key], samples), of(self._methods[UNREDUCED], samples)
            values = {(name, False): value for name, value in now.items()}
            return values | {(name, True): value - before[name] for name, value in now.items()}

        estimates = statistics.jackknife(figures, _images(self.answered))
        return {
            name: Measure(**vars(estimate), difference_to_unreduced=None if key == UNREDUCED else estimates[name, True])
            for (name, difference), estimate in estimates.items()
            if not difference
        }

    def _paper_ratio(self, key: str) -> float:
        """Prefill FLOPs relative to the unreduced model's in the way of FastV's paper, which leaves out the text."""

        def visual(record: Record) -> float:
            text = record.lengths[0] - (record.entering or 0)
            return self._paper_flops([length - text for length in record.lengths])

        ids = [sample.id for sample in self.answered]
        return sum(self._methods[key].mean(ids, visual)) / sum(self._methods[UNREDUCED].mean(ids, visual))


def _score(method: Method, samples: Sequence[Sample]) -> Estimate:
    scores = method.numbers([sample.id for sample in samples], "score")
    return cast(Estimate, statistics.score(scores, _images(samples)))  # None of no samples alone


def _mean_score(run: Run, ids: Sequence[str]) -> float:
    return sum(number("score", run.records[each]) for each in ids) / len(ids)


def _images(samples: Sequence[Sample]) -> list[str]:
    return [sample.image_id for sample in samples]
