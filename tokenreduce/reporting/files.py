"""The report's tables as files: Markdown to paste, CSV in full precision."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenreduce.evaluation.records import storage, write_atomically
from tokenreduce.reporting.columns import Column, costs, interval, quality, raw
from tokenreduce.reporting.formatting import percent
from tokenreduce.reporting.study import Study, score_in

PAGE, RESULTS, CATEGORIES, MARKDOWN, FIGURES = "index.html", "results.csv", "categories.csv", "report.md", "figures"
"""The files of a report's folder."""


def write_tables(studies: Sequence[Study], output: Path, title: str) -> None:
    """Write all tables of all studies into ``output``."""
    _write_csv(output / RESULTS, [raw(study, row) for study in studies for row in study.rows])
    _write_csv(output / CATEGORIES, [each for study in studies for each in _categories(study)])
    parts = [f"# {_cell(title)}", *(_markdown(study) for study in studies)]
    write_atomically(output / MARKDOWN, "\n\n".join(parts) + "\n")


def _markdown(study: Study) -> str:
    by_category = [[row.label, *(percent(score_in(row, name)) for name in study.categories)] for row in study.rows]
    benchmark = study.unreduced.comparison.result.benchmark
    parts = [
        f"## {_cell(study.title)}",
        f"{benchmark.samples} questions about {benchmark.images} images; intervals of 95 %, clustered by image.",
        _columns(study, quality(study)),
        "### Costs",
        _columns(study, costs(study)),
        "### Score by category, %",
        _table(["method", *study.categories], by_category),
        *study.notes,
    ]
    return "\n\n".join(parts)


def _columns(study: Study, shown: Sequence[Column]) -> str:
    head = ["method", *(f"{each.title} ({each.unit})" if each.unit else each.title for each in shown)]
    return _table(head, [[row.label, *(each.text(row) for each in shown)] for row in study.rows])


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(text: str) -> str:
    """Text that stays one cell, and is no markup."""
    return re.sub(r"([\\|<>`*\[\]])", r"\\\1", " ".join(text.split()))


def _categories(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "benchmark": study.benchmark,
            "model": study.model,
            "method": row.label,
            "category": name,
            "samples": found.samples,
            **interval("score", found.score),
            **interval("difference_to_unreduced", found.difference_to_unreduced),
        }
        for row in study.rows
        for name, found in row.method.categories.items()
    ]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with storage(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
