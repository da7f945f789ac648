"""Compact position ids against original ones, method by method, paired by question."""

from __future__ import annotations

import sys
from pathlib import Path

from tokenreduce.evaluation import Record, StorageError, read_records, read_result
from tokenreduce.evaluation.statistics import difference


def main(runs: list[Path]) -> None:
    """Print a row a method, out of the folders of its two runs."""
    methods: dict[str, dict[str, list[Record]]] = {}
    for run in runs:
        try:
            result = read_result(run)
        except StorageError:  # a baseline, which has no comparison of its own
            continue
        records = read_records(run, limit=result.settings.limit)
        methods.setdefault(result.main.name, {})[result.main.knobs["positions"]] = records
    for name, policies in methods.items():
        pairs = list(zip(policies["compact"], policies["original"], strict=True))
        after, before = ([record.score or 0.0 for record in each] for each in zip(*pairs, strict=True))
        estimate = difference(after, before, [compact.image_id for compact, _ in pairs])
        if estimate is None or estimate.low is None or estimate.high is None:
            raise ValueError(f"{name}: the questions of a single picture tell nothing")
        changed = sum(compact.answer != original.answer for compact, original in pairs)
        value, low, high = (f"{100 * figure:+.1f}" for figure in (estimate.value, estimate.low, estimate.high))
        print(f"| `{name}` | {value} [{low}, {high}] | {changed} of {len(pairs)} |")


if __name__ == "__main__":
    main(sorted(Path(sys.argv[1]).iterdir()))
