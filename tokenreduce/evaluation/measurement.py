"""Times, peak memory and the least possible times, measured on the machine at hand for all methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.evaluation.backend import MeasuredBackend
from tokenreduce.evaluation.methods import Method
from tokenreduce.evaluation.result import UNREDUCED, Measured
from tokenreduce.evaluation.runner import Runner
from tokenreduce.reducer import TokenReducer


def measure(
    backend: MeasuredBackend, runner: Runner, methods: Mapping[str, Method], answered: Sequence[Sample], pairs: int
) -> dict[str, Measured]:
    """Measure every method; each is timed ``pairs`` times, in turns with the others."""
    # One question an image: as many different pictures as there are.
    timed = list({sample.image_id: sample for sample in reversed(answered)}.values())[::-1][:pairs]
    reducers = {key: [_reducer(key, method, sample) for sample in timed] for key, method in methods.items()}
    prompts = [runner.prompts.prompt(sample) for sample in timed]
    runner.progress.start("timing", pairs)
    try:
        times = backend.times(reducers, prompts, pairs, runner.progress.advance)
    finally:
        runner.progress.finish()
    runner.forget()
    batch = answered[: runner.fitting]
    prompts, ids = [runner.prompts.prompt(sample) for sample in batch], [sample.id for sample in answered]
    measured = {}
    for key, method in methods.items():
        first, *others = (_reducer(key, method, sample) for sample in batch)
        # A random baseline whose counts differ by sample does not run as one batch, so it has no comparable peak.
        alike = all(other == first for other in others)
        measured[key] = Measured(
            time_to_first_token=times[key].time_to_first_token,
            decode_per_token=times[key].decode_per_token,
            roofline=backend.roofline(
                sum(method.numbers(ids, "llm_flops")) / len(ids), sum(method.numbers(ids, "kv_bytes")) / len(ids)
            ),
            peak_memory=backend.peak_memory(prompts, first, runner.max_new_tokens) if alike else None,
        )
    return measured


def _reducer(key: str, method: Method, sample: Sample) -> TokenReducer | None:
    """The method's reducer; None for the unreduced model, which nothing is attached to."""
    return None if key == UNREDUCED else method.reducer_for(sample.id)
