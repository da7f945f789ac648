"""The outcomes of the jobs of a sweep.

Each job leaves a file, since jobs may run in other processes, or on other machines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenreduce.evaluation.records import storage, write_atomically

Marks = dict[Path, tuple[int, int]]
"""The files of outcomes, with what tells whether one was written anew."""


@dataclass(frozen=True)
class Outcome:
    """One job: its place in the sweep, what it was started with, and the folder of its ``run`` or its ``error``."""

    number: int
    overrides: tuple[str, ...]
    run: str | None
    error: str | None
    seconds: float

    def write(self, sweep: Path) -> None:
        path = _folder(sweep) / f"{self.number:03}.json"
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def marks(sweep: Path) -> Marks:
    """The outcomes that are there now, so that later ones can be told from them."""
    stats = {path: path.stat() for path in _folder(sweep).glob("*.json")}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def outcomes_since(sweep: Path, before: Marks) -> list[Outcome]:
    """The outcomes written since, by number."""
    paths = (path for path, mark in marks(sweep).items() if before.get(path) != mark)
    return sorted(map(_read, paths), key=lambda outcome: outcome.number)


def varied(outcomes: Sequence[Outcome]) -> dict[int, str]:
    """The overrides that tell each job from the others, by its number."""
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if len(outcomes) > 1 else set()
    return {
        outcome.number: " ".join(override for override in outcome.overrides if override not in common)
        for outcome in outcomes
    }


def _folder(sweep: Path) -> Path:
    return sweep / "jobs"


def _read(path: Path) -> Outcome:
    with storage(path, "read"):
        content = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(**{**content, "overrides": tuple(content["overrides"])})
