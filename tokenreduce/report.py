"""``python -m tokenreduce.report RUNS… -o report/``: one page, tables and figures from the folders of finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenreduce.messages import SUCCESS, plain_warnings, refused
from tokenreduce.reporting.html import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report of the runs named in ``arguments``, by default the process's own; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenreduce.report", description=write_report.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders that hold them")
    parser.add_argument("-o", "--output", type=Path, default=Path("report"), help="where the report goes")
    parser.add_argument("--title", help="the page's heading")
    parser.add_argument("--sample", action="append", metavar="ID", help="draw this sample; may be given several times")
    options = parser.parse_args(arguments)
    with plain_warnings():
        try:
            page = write_report(options.runs, options.output, title=options.title, samples=options.sample)
        except (ValueError, OSError) as error:
            return refused(error)
    print(page)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
