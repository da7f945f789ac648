"""The loop: a benchmark's samples through a back end with a reducer, one record each.

Batches are fixed by the samples' positions, so that a run that was stopped and goes on, or one whose limit was
raised, has the very batches, and hence the answers, of one that was never stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from tokenreduce.benchmarks.benchmark import Benchmark, QuestionError, Sample
from tokenreduce.evaluation.backend import Answer, Backend
from tokenreduce.evaluation.processes import Processes
from tokenreduce.evaluation.progress import Progress, Silent
from tokenreduce.evaluation.prompts import PLACE, Prompts
from tokenreduce.evaluation.records import (
    Record,
    RecordFile,
    in_order,
    merge,
    read_records,
    storage,
)
from tokenreduce.reducer import TokenReducer

ReducerFor = Callable[[str], TokenReducer]
"""The reducer of each sample, by its id."""

HOPELESS = 8
"""After this many samples that all failed in the model with one and the same message, the run itself is at fault."""


class Runner:
    """Makes runs that share a back end and the questions that it is asked.

    ``limit`` takes the first samples only. A sample that cannot be read or answered becomes a record with its error; a
    batch that does not fit into memory is halved. Several ``processes`` that run alike share the work.
    """

    def __init__(
        self,
        backend: Backend,
        benchmark: Benchmark,
        *,
        batch_size: int = 32,
        limit: int | None = None,
        max_new_tokens: int = 16,
        prompt: str = PLACE,
        progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("limit", limit), ("max_new_tokens", max_new_tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value} is not a whole number above 0")
        if not len(benchmark):
            raise ValueError(f"the benchmark {type(benchmark).__name__} has no samples")
        self.prompts = Prompts(benchmark, prompt, backend.image_tokens)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.total = min(len(benchmark), limit or len(benchmark))
        self.progress = progress or Silent()
        self.processes = processes or Processes()
        self.fitting = batch_size
        self._backend = backend
        self._available = len(benchmark)
        self._share_vision = False

    def samples(self) -> list[Sample]:
        """The samples of the run. Raises ``ValueError`` where two have the same id."""
        samples = self.prompts.samples(0, self.total)
        (most, times), *_ = Counter(sample.id for sample in samples).most_common(1)
        if times > 1:
            raise ValueError(f"{times} samples have the id {most!r}: ids must be unique, records are kept by them")
        return samples

    def run(
        self,
        reducer: TokenReducer | ReducerFor,
        folder: Path,
        phase: str = "samples",
        *,
        share_vision: bool = False,
    ) -> list[Record]:
        """Answer all samples, and return their records in order. ``share_vision``: see :meth:`Backend.answer`.

        What the folder already holds is not done again, so it must be this very run's
        (:mod:`tokenreduce.evaluation.identity`); jobs that share a folder wait for each other. Raises ``StorageError``
        when the folder cannot be written, and the back end's own error when the first samples all fail in it alike.
        """
        self._share_vision = share_vision
        reducer_for = (lambda _: reducer) if isinstance(reducer, TokenReducer) else reducer
        ids = [sample.id for sample in self.samples()]
        several = self.processes.count > 1
        if several:
            phase = f"{phase}, share 1 of {self.processes.count}"
        with ExitStack() as held:
            with self.processes.together():
                if self.processes.main:
                    held.enter_context(locked(folder, self.progress))
                    merge(folder, ids)  # a run of several processes may have been stopped before it came to that
            with self.processes.together(), RecordFile(folder, self.processes.index if several else None) as file:
                missing = self._missing(ids, file.records.keys())
                share = self.processes.share(missing)
                done = sum(each in file.records for each in ids)
                self.progress.start(phase, done + sum(len(wanted) for _, wanted in share), done)
                try:
                    self._answer(share, reducer_for, file)
                finally:
                    self.progress.finish()
            with self.processes.together():
                if self.processes.main and missing:
                    merge(folder, ids)
            records = {record.id: record for record in read_records(folder)} if several else file.records
            return in_order(records, ids)

    def _missing(self, ids: Sequence[str], found: Container[str]) -> list[tuple[int, list[str]]]:
        """Each unfinished batch: where it begins, and which of its samples have no record yet."""
        batches = []
        for start in range(0, self.total, self.batch_size):
            wanted = [each for each in ids[start : start + self.batch_size] if each not in found]
            if wanted:
                batches.append((start, wanted))
        return batches

    def _answer(self, batches: Sequence[tuple[int, Sequence[str]]], reducer_for: ReducerFor, file: RecordFile) -> None:
        # Failures wait until something has succeeded: a run that cannot work at all shall leave no records.
        held: list[tuple[Record, Exception | None]] = []
        working = bool(file.records)
        for start, wanted in batches:
            # A limit that cuts a batch cuts its records, not the batch: neighbours can change an answer's last digits.
            batch = self.prompts.samples(start, min(start + self.batch_size, self._available))
            held += [pair for pair in self._batch(batch, reducer_for) if pair[0].id in wanted]
            working = working or any(record.error is None for record, _ in held)
            if not working:
                _raise_if_hopeless(held)
                continue
            self.progress.advance(len(file.append(record for record, _ in held)))
            held.clear()
        if held:
            _raise_if_hopeless(held, finished=True)
            self.progress.advance(len(file.append(record for record, _ in held)))

    def _batch(self, samples: Sequence[Sample], reducer_for: ReducerFor) -> list[tuple[Record, Exception | None]]:
        """A record for each sample, with the back end's exception where that is what went wrong."""
        done: dict[str, tuple[Record, Exception | None]] = {}
        groups: list[tuple[TokenReducer, list[Sample]]] = []
        for sample in samples:
            if error := self.prompts.unreadable(sample):
                what = "" if isinstance(error, QuestionError) else "image cannot be read: "
                done[sample.id] = _failure(sample, what + _described(error)), None
            else:
                reducer = reducer_for(sample.id)
                for known, members in groups:
                    if known == reducer:
                        members.append(sample)
                        break
                else:
                    groups.append((reducer, [sample]))
        for reducer, members in groups:
            done.update((pair[0].id, pair) for pair in self._generate(members, reducer))
        return [done[sample.id] for sample in samples]

    def _generate(self, samples: Sequence[Sample], reducer: TokenReducer) -> list[tuple[Record, Exception | None]]:
        if len(samples) > self.fitting:
            parts = [samples[start : start + self.fitting] for start in range(0, len(samples), self.fitting)]
            return [pair for part in parts for pair in self._generate(part, reducer)]
        try:
            return [(record, None) for record in self._answered(samples, reducer)]
        except Exception as error:  # one bad sample must not end a long run
            if len(samples) == 1:
                return [(_failure(samples[0], _described(error)), error)]
            crowded = out_of_memory(error)
        # Outside of the handler, so that the failed call's tensors are free.
        if not crowded:
            return [pair for sample in samples for pair in self._generate([sample], reducer)]
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        self.fitting = len(samples) // 2
        self.progress.note(f"out of memory with {len(samples)} samples at once: going on with {self.fitting}")
        return self._generate(samples, reducer)

    def _answered(self, samples: Sequence[Sample], reducer: TokenReducer) -> list[Record]:
        prompts = [self.prompts.prompt(sample) for sample in samples]
        answers = self._backend.answer(prompts, reducer, self.max_new_tokens, share_vision=self._share_vision)
        return [
            _record(sample, answer, self.prompts.score(answer.text, sample))
            for sample, answer in zip(samples, answers, strict=True)
        ]

    def rehearse(self, reducer: TokenReducer) -> None:
        """Make one token of one answer. Raises whatever keeps the reducer from working with this back end."""
        if (sample := next(self.prompts.readable(self.samples()), None)) is not None:
            self._backend.answer([self.prompts.prompt(sample)], reducer, max_new_tokens=1)

    def forget(self) -> None:
        """Drop the images and inputs that are kept in memory."""
        self.prompts.forget()
        self._backend.forget()


def out_of_memory(error: Exception) -> bool:
    """True for the ways in which torch, or Python, says that memory is not enough."""
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


@contextmanager
def locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the folder, which is made if need be, against other jobs; a killed job's lock is free again."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.note(f"waiting for another job that is working on {folder}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _record(sample: Sample, answer: Answer, score: float) -> Record:
    reduction, cost = answer.reduction, answer.cost
    return Record(
        id=sample.id,
        image_id=sample.image_id,
        category=sample.category,
        question=sample.question,
        expected=sample.answers,
        answer=answer.text,
        score=score,
        visual_tokens=reduction.visual_tokens,
        entering=reduction.entering,
        lengths=reduction.lengths,
        images=reduction.images,
        layer_mean=cost.layer_mean,
        vision_flops=cost.vision_flops,
        llm_flops=cost.llm_flops,
        kv_bytes=cost.kv_bytes,
        seconds=round(answer.seconds, 6),
    )


def _failure(sample: Sample, error: str) -> Record:
    return Record(sample.id, sample.image_id, sample.category, sample.question, sample.answers, error=error)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _raise_if_hopeless(held: Sequence[tuple[Record, Exception | None]], finished: bool = False) -> None:
    """Raise the back end's error if it is all that there is, and always the same."""
    errors = [error for _, error in held if error is not None]
    if errors and (len(errors) >= HOPELESS or finished) and len({_described(error) for error in errors}) == 1:
        raise errors[0]
