"""Finished comparisons, found again on disk: their results, and the records behind them where these are there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tokenreduce.evaluation.comparison import CONFIG
from tokenreduce.evaluation.records import PARTS, RECORDS, Record, StorageError, read_records
from tokenreduce.evaluation.result import METRICS, UNREDUCED, Result, read_result

Records = Mapping[str, Record]
"""One run's records by sample."""


@dataclass(frozen=True)
class Skipped:
    """A folder that is not in the report, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Comparison:
    """One run's folder with its result, ``config.yaml`` and the records of every method's runs.

    records: for every method its runs, for every run its records by sample; those of other samples than ``drawn``
             come without what a picture needs. Empty where a run's records are gone.
    """

    folder: Path
    result: Result
    config: Mapping[str, Any]
    records: Mapping[str, Sequence[Records]]

    @cached_property
    def answered(self) -> list[Record]:
        """The unreduced model's records of the samples that every run answered: those that were compared."""
        runs = [run for runs in self.records.values() for run in runs]
        plain = self.records[UNREDUCED][0] if runs else {}
        return [
            record
            for record in plain.values()
            if all(record.id in run and run[record.id].error is None for run in runs)
        ]

    def scores(self, method: str) -> list[float]:
        """The score of every answered sample, the mean over the method's runs."""
        runs = self.records[method]
        return [sum(run[record.id].score or 0.0 for run in runs) / len(runs) for record in self.answered]


DrawnFor = Callable[[Iterable[Record]], Collection[str]]
"""Which of the unreduced model's samples are drawn, by id."""


def find(places: Sequence[Path | str], drawn: DrawnFor = lambda _: ()) -> tuple[list[Comparison], list[Skipped]]:
    """Every finished comparison at or below ``places``, oldest first, and what there was besides.

    Raises ``ValueError`` for a place that does not exist, and where nothing is finished.
    """
    folders: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place} does not exist: give folders of runs, or one that holds them, such as outputs/")
        root = place if place.is_dir() else place.parent
        holding = (path.parent for name in (METRICS, RECORDS, PARTS) for path in root.rglob(name))
        folders |= dict.fromkeys(sorted(holding))
    reader = _Reader(drawn)
    comparisons: dict[str, Comparison] = {}
    skipped: list[Skipped] = []
    finished = sorted(
        (each for each in folders if (each / METRICS).exists()), key=lambda each: _modified(each, METRICS)
    )
    for folder in finished:
        try:
            comparison = reader.read(folder)
        except (OSError, ValueError) as error:
            skipped.append(Skipped(folder, f"its {METRICS} cannot be used: {type(error).__name__}: {error}"))
            continue
        key = f"{comparison.result.run.hash} {comparison.result.settings.limit}"
        if key in comparisons:
            skipped.append(Skipped(comparisons[key].folder, f"the same run is in {folder}, and newer"))
        comparisons[key] = comparison
    belonging = {
        comparison.folder.parent / run
        for comparison in comparisons.values()
        for method in comparison.result.methods.values()
        for run in method.runs
    }
    for folder in folders:
        if folder not in finished and folder not in belonging:
            reason = f"not finished, there is no {METRICS}: the command that began it continues where it stopped"
            skipped.append(Skipped(folder, reason))
    if not comparisons:
        known = "".join(f"\n  {each.folder}: {each.reason}" for each in skipped)
        where = ", ".join(map(str, places)) or "no folder"
        raise ValueError(f"no finished comparison in {where}: a folder with {METRICS} is one{known}")
    return list(comparisons.values()), skipped + reader.skipped


class _Reader:
    """Reads comparisons that share runs: the unreduced one is read once."""

    def __init__(self, drawn: DrawnFor) -> None:
        self._drawn = drawn
        self._runs: dict[tuple[Path, int | None], Records] = {}
        self._ids: dict[tuple[Path, int | None], Collection[str]] = {}
        self.skipped: list[Skipped] = []

    def read(self, folder: Path) -> Comparison:
        result = read_result(folder)
        limit = result.settings.limit
        plain = folder.parent / result.unreduced.runs[0]
        try:
            drawn = self._chosen(plain, limit)
            records = {
                key: [self._run(folder.parent / run, limit, drawn) for run in method.runs]
                for key, method in result.methods.items()
            }
        except StorageError as error:
            self.skipped.append(Skipped(folder, f"shown without what needs records: {error}"))
            records = {}
        return Comparison(folder, result, _config(folder), records)

    def _chosen(self, plain: Path, limit: int | None) -> Collection[str]:
        key = plain, limit
        if key not in self._ids:
            self._ids[key] = frozenset(self._drawn(read_records(plain, limit)))
        return self._ids[key]

    def _run(self, folder: Path, limit: int | None, drawn: Collection[str]) -> Records:
        key = folder, limit
        if key not in self._runs:
            if not (folder / RECORDS).exists():
                raise StorageError(f"{folder / RECORDS} is missing")
            # Which tokens were kept is most of a record, and is only looked at where it is drawn.
            self._runs[key] = {
                record.id: record if record.id in drawn else replace(record, images=(), lengths=())
                for record in read_records(folder, limit)
            }
        return self._runs[key]


def _config(folder: Path) -> Mapping[str, Any]:
    """The configuration that the run was started with, as far as it is known."""
    try:
        content = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    config = content.get("config") if isinstance(content, dict) else None
    return config if isinstance(config, dict) else {}


def _modified(folder: Path, name: str) -> float:
    return (folder / name).stat().st_mtime
