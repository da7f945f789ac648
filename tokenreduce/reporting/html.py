"""The report: one self-contained page, with its tables and figures beside it as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenreduce.evaluation.records import storage
from tokenreduce.reporting.charts import Painter
from tokenreduce.reporting.comparisons import find
from tokenreduce.reporting.files import write_tables
from tokenreduce.reporting.study import studies

PAGE = "index.html"


def write_report(
    runs: Sequence[Path | str],
    output: Path | str = "report",
    *,
    title: str | None = None,
    samples: Sequence[str] | None = None,
) -> Path:
    """Write a page, Markdown and CSV tables and figures about finished runs, from their records alone.

    ``runs`` are folders of runs or folders that hold them; ``samples`` are those whose kept tokens are drawn, by
    default some of every category. What is broken or not finished is listed and left out. Returns the page's path.
    Raises ``ValueError`` where no run is finished, ``StorageError`` where ``output`` cannot be written.
    """
    output = Path(output)
    found, _ = find(runs)
    told = studies(found)
    with storage(output):
        (output / "figures").mkdir(parents=True, exist_ok=True)
    heading = title or "; ".join(study.title for study in told)
    write_tables(told, output, heading)
    series = sorted({name for study in told for name in study.series})
    for study in told:
        for chart in Painter(study, series).charts():
            chart.png(output / "figures" / f"{chart.name}.png")
    return output / PAGE
