"""How long every registered method takes to select, and how much memory, from 576 to 16384 visual tokens.

Every step of a method runs on random states (``tokenreduce.testing.MadeUp``), on one thread, which BLAS takes from the
environment, each method and size in a process of its own. Times are the processor's, so that other work on the machine
does not count, and cover ``select`` with the signals that it asks for. ``result.json`` and the table in ``README.md``
are written as it goes:

    OMP_NUM_THREADS=1 python experiments/selection/measure.py
    OMP_NUM_THREADS=1 python experiments/selection/measure.py --only fopru_rank tome  # renews these rows
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import platform
import resource
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tokenreduce import available
from tokenreduce.catalog.description import example
from tokenreduce.evaluation.clock import peak_memory
from tokenreduce.reducer import Grid, TokenReducer
from tokenreduce.registry import REDUCERS
from tokenreduce.testing import MadeUp

GRIDS = ("24x24", "48x60", "64x98", "128x128")
"""576, 2880, 6272 and 16384 tokens."""

DIM, KEEP = 1024, 1 / 9
ROUNDS, ENOUGH = 50, 0.5
"""At most so many runs a size, until they took so many seconds."""

FOLDER = Path(__file__).parent
MARKS = ("<!-- table -->\n", "<!-- /table -->\n")


def reducer(name: str) -> TokenReducer:
    """A method that keeps a ninth, or what its own settings say where it has no knob for that."""
    made = example(name, REDUCERS.get(name))
    if made is None:
        raise ValueError(f"{name} has knobs without default, and no preset sets them all")
    try:
        return made.with_keep(KEEP)
    except TypeError:
        return made


def measured(name: str, grid: Grid, limit: int) -> dict[str, Any]:
    """A method's figures at one size, in this process, which the kernel ends after ``limit`` seconds more."""
    method, seconds = reducer(name), list[float]()

    @contextmanager
    def timed() -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[-1] += time.process_time() - start

    def run(view: MadeUp) -> int | None:
        """How many rows are left; None where no step selects."""
        seconds.append(0.0)
        left = None
        for selection in view.run(method, timed):
            left = len(selection.index)
        return left

    run(MadeUp(Grid(12, 12), dim=DIM))  # libraries are loaded
    seconds.clear()
    view, processor = MadeUp(grid, dim=DIM), torch.device("cpu")
    end = math.ceil(time.process_time() + limit)
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    kept, before = list[int | None](), peak_memory(processor, lambda: None)
    peak = peak_memory(processor, lambda: kept.append(run(view)))
    for _ in range(ROUNDS):
        if kept[0] is None or sum(seconds) > ENOUGH:  # the clock of a processor may be coarse
            break
        run(view)
    return {
        "kept": kept[0],
        "milliseconds": 1e3 * statistics.mean(seconds),
        "peak_bytes": None if peak is None or before is None else peak - before,
    }


def figures(connection: Connection, *arguments: Any) -> None:
    """Send them to the process that made this one, or what went wrong."""
    gc.freeze()  # what that one had imported is not looked through again
    try:
        connection.send(measured(*arguments))
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})


def row(name: str, grid: str, limit: int) -> dict[str, Any]:
    """A method at one size, measured in a process of its own."""
    context = multiprocessing.get_context("fork")  # libraries are imported once
    ours, theirs = context.Pipe()
    child = context.Process(target=figures, args=(theirs, name, Grid(*map(int, grid.split("x"))), limit))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = {}
    child.join()
    if child.exitcode == -signal.SIGXCPU:
        found = {"over_limit_seconds": limit}
    return _size(name, grid) | (found or {"error": f"its process ended with status {child.exitcode}"})


def exponent(rows: Sequence[dict[str, Any]]) -> float | None:
    """By what power of the tokens time grows, fitted over the sizes that were measured."""
    points = [(math.log(each["tokens"]), math.log(each["milliseconds"])) for each in rows if each.get("milliseconds")]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Every method's row, and a sentence on those that select nothing."""
    sizes = sorted({each["tokens"] for each in rows})
    methods: dict[str, dict[int, dict[str, Any]]] = {}
    for each in rows:
        methods.setdefault(each["method"], {})[each["tokens"]] = each
    lines = [
        "| method | " + " | ".join(f"ms at {size}" for size in sizes) + " | exponent | "
        + " | ".join(f"MiB at {size}" for size in sizes) + " |",
        "|---" * (2 + 2 * len(sizes)) + "|",
    ]  # fmt: skip
    idle, notes = [], []
    for name, by_size in sorted(methods.items()):
        if all("kept" in each and each["kept"] is None for each in by_size.values()):
            idle.append(name)
            continue
        own = [by_size.get(size, {}) for size in sizes]
        power = exponent(own)
        cells = [name, *(_time(each) for each in own), "-" if power is None else f"{power:.1f}"]
        lines.append("| " + " | ".join([*cells, *(_memory(each) for each in own)]) + " |")
        notes += [f"- {name} at {each['tokens']} tokens: {each['error']}" for each in own if "error" in each]
    if idle:
        lines += ["", f"These select among no tokens: {', '.join(idle)}."]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _time(found: dict[str, Any]) -> str:
    if "milliseconds" in found:
        return f"{found['milliseconds']:,.{0 if found['milliseconds'] >= 10 else 1}f}"
    return f"over {found['over_limit_seconds']} s" if "over_limit_seconds" in found else "-"


def _memory(found: dict[str, Any]) -> str:
    return f"{found['peak_bytes'] / 2**20:,.0f}" if found.get("peak_bytes") is not None else "-"


def write(result: dict[str, Any], folder: Path) -> None:
    """``result.json``, and the table in the README beside it."""
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    readme, (first, last) = folder / "README.md", MARKS
    if readme.exists():
        before, rest = readme.read_text(encoding="utf-8").split(first)
        after = rest.split(last)[1]
        readme.write_text(f"{before}{first}{table(result['rows'])}{last}{after}", "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="renew the rows of these methods")
    parser.add_argument("--grids", nargs="+", default=GRIDS, help="rows x columns of tokens (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=60, help="seconds for one method and size (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the result is (default: beside this file)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = options.only or [name for name in available("reducers") if name != "chain"]
    file = options.folder / "result.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["rows"] if options.only and file.exists() else []
    rows = [each for each in kept if each["method"] not in names]
    for name in names:
        over = False
        for grid in options.grids:  # a larger one takes longer still
            rows.append(rows[-1] | _size(name, grid) if over else row(name, grid, options.limit))
            over = "over_limit_seconds" in rows[-1]
            print(json.dumps(rows[-1]), flush=True)
        about = {"torch": torch.__version__, "processor": platform.machine(), "threads": 1, "dim": DIM}
        rows.sort(key=lambda each: (each["method"], each["tokens"]))
        write({**about, "limit_seconds": options.limit, "rows": rows}, options.folder)
    return 0


def _size(name: str, grid: str) -> dict[str, Any]:
    height, width = map(int, grid.split("x"))
    return {"method": name, "grid": grid, "tokens": height * width}


if __name__ == "__main__":
    sys.exit(main())
