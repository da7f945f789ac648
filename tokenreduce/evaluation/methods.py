"""The methods of a comparison: their runs, and the random selection that keeps as much of every sample as a reducer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenreduce.evaluation.records import Record
from tokenreduce.evaluation.runner import ReducerFor
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import create

Share = int | float | None
"""The part of a sample that is kept: a number of tokens of each image, a ratio of all tokens, or None for all."""


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

    def numbers(self, ids: Sequence[str], field: str) -> list[float]:
        """The mean over runs of a record's field, by sample."""
        return self.mean(ids, partial(number, field))


def number(field: str, record: Record) -> float:
    """A field of a record that answers its sample. Raises ``ValueError`` where it is missing."""
    value = getattr(record, field)
    if value is None:
        raise ValueError(
            f"the record of {record.id!r} has no {field}, though it has no error either: delete its run's folder"
        )
    return float(value)


class MatchedRandom:
    """For each sample the random reducer that keeps its share (see :func:`share`)."""

    def __init__(self, shares: Mapping[str, Share], seed: int) -> None:
        self._shares = shares
        self._reducers: dict[Share, TokenReducer] = {each: _random(each, seed) for each in set(shares.values())}

    def __call__(self, sample: str) -> TokenReducer:
        if self.same or sample not in self._shares:  # one that the reducer failed at: it is in no comparison
            return self.same or create("none")
        return self._reducers[self._shares[sample]]

    @property
    def same(self) -> TokenReducer | None:
        """The reducer of all samples, where it is one."""
        return next(iter(self._reducers.values())) if len(self._reducers) == 1 else None


def share(record: Record) -> Share:
    """The share that random selection has to keep of a sample to spend as much as was spent on it."""
    total, mean = record.visual_tokens or 0, record.layer_mean or 0.0
    # What is dropped inside the language model costs until then: random selection gets the same mean over layers.
    kept = max(1, round(mean)) if mean else 0
    if kept >= total:
        return None
    if len(record.images) <= 1 or not kept:
        return kept
    each, rest = divmod(kept, len(record.images))
    return each if not rest and len({image.grid for image in record.images}) == 1 else kept / total


def _random(share: Share, seed: int) -> TokenReducer:
    if share is None:
        return create("none")
    return create("random", keep=share, seed=seed) if share else create("no_image")
