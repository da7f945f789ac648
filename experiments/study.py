"""Run a study and keep what is committed of it: ``python experiments/study.py budgets``.

The study itself is a configuration, ``conf/experiment/NAME.yaml``. Beside its README, its folder holds the report's
tables (``report.md``, ``results.csv``) and one of its figures; the whole report, with every kept token, is in
``outputs/NAME/report``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenreduce.reporting.html import write_report

FIGURES = {"budgets": "score_layer_mean", "chain": "ranking", "fopru": "ranking", "positions": "ranking"}
"""Every study, and the figure of its report that shows what it found."""

SETTINGS = ("tracking=none", "evaluation.timing_pairs=0", "evaluation.pictures=0")
"""Scores and counts alone: times are measured where nothing else runs (experiments/speed)."""


def publish(study: str, runs: Sequence[Path], report: Path) -> None:
    """Report on the ``runs`` of a study, and copy what is committed of that."""
    write_report(runs, report, title=f"The study {study}")
    folder = Path(__file__).parent / study
    folder.mkdir(exist_ok=True)
    for name in ("report.md", "results.csv", f"figures/{FIGURES[study]}.svg"):
        shutil.copy(report / name, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=FIGURES)
    parser.add_argument("--limit", type=int, default=250, help="questions, five a picture (default: %(default)s)")
    options = parser.parse_args()
    output = Path("outputs") / options.study
    settings = [f"experiment={options.study}", f"benchmark.limit={options.limit}", f"output={output}", *SETTINGS]
    # A budget that a method cannot meet is refused, which the status tells; the others are compared all the same.
    subprocess.run([sys.executable, "-m", "tokenreduce", *settings], check=False)
    publish(options.study, [output], output / "report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
