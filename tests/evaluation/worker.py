"""Runs that are killed, interrupted or started twice: real processes, forked from one that has imported everything.

``python worker.py FOLDER`` prints what happened as JSON; test_continuation.py says what should have.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from conftest import Cards, make_model, make_processor  # type: ignore[import-not-found]

from tokenreduce import create
from tokenreduce.evaluation import (
    Comparer,
    Processes,
    Settings,
    Silent,
    StorageError,
    TransformersBackend,
    evaluate,
    read_records,
    records,
)
from tokenreduce.evaluation.processes import launched

KILLS = 20
FORK = multiprocessing.get_context("fork")
MODEL = make_model()
PROCESSOR = make_processor(MODEL)


class Batches(Silent):
    """Counts what was answered in this process."""

    def __init__(self) -> None:
        self.done = 0
        self.waited = False

    def advance(self, count: int = 1) -> None:
        self.done += count

    def note(self, message: str) -> None:
        self.waited = True


def run(folder: Path, progress: Silent | None = None, processes: Processes | None = None) -> None:
    evaluate(
        MODEL,
        PROCESSOR,
        Cards(count=24, broken=(5,)),
        create("random", keep=9),
        folder=folder,
        batch_size=4,
        max_new_tokens=3,
        progress=progress,
        processes=processes,
    )


def answer(folder: Path) -> int:
    run(folder)
    return 0


def mortal(folder: Path, written: int) -> int:
    die_after(written)
    return answer(folder)


def fork(work: Callable[[], int]) -> int:
    """Process id of a child that does ``work`` and exits with what it returns."""
    if child := os.fork():
        return child
    code = 1
    try:
        code = work()
    finally:
        os._exit(code)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_after(written: int) -> None:
    """Kill this process with -9 as soon as that many bytes of records were written, wherever in a line that is."""

    class Mortal(FileIO):
        left = written

        def write(self, data: Any) -> int:
            part = bytes(data)[: Mortal.left]
            count = super().write(part)
            Mortal.left -= count
            if not Mortal.left:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

    records.FileIO = Mortal  # type: ignore[attr-defined]


def killed(folder: Path) -> dict[str, Any]:
    """Twenty runs that die at random moments, most of them inside a line, and one that lives."""
    moments = random.Random(0)
    path = folder / records.RECORDS
    size = (folder.parent / "calm" / records.RECORDS).stat().st_size
    deaths, torn = 0, 0
    for number in range(KILLS):
        content = path.read_bytes() if path.exists() else b""
        missing = size - content.rfind(b"\n") - 1
        if number % 4:
            # Less than what is still to be written, so that it does die; the seconds in a record vary by some digits.
            child = fork(partial(mortal, folder, moments.randrange(1, min(missing - 200, size // 6))))
        else:
            child = fork(partial(answer, folder))
            time.sleep(moments.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
        deaths += status(child) == -signal.SIGKILL
        content = path.read_bytes() if path.exists() else b""
        torn += bool(content) and not content.endswith(b"\n")
        if len(read_records(folder)) > 18:  # nearly done: lose the second half, as a worse disk would
            path.write_bytes(content[: len(content) // 2])
    return {"deaths": deaths, "torn": torn, "end": status(fork(partial(answer, folder)))}


def interrupted(folder: Path) -> dict[str, Any]:
    """Ctrl-C in the middle, then the same command again."""

    class Slow(Batches):
        def advance(self, count: int = 1) -> None:
            super().advance(count)
            if self.done >= 8:
                (folder / "half").touch()
                time.sleep(60)

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run(folder, Slow())
        except KeyboardInterrupt:
            return 130
        return 0

    child = fork(work)
    while not (folder / "half").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    code = status(child)
    content = (folder / records.RECORDS).read_bytes()
    run(folder)
    return {"code": code, "lines": content.count(b"\n"), "whole": content.endswith(b"\n")}


def doubled(folder: Path) -> dict[str, Any]:
    """The same run started twice at the same time."""

    class Patient(Batches):
        """Goes on only when the other job has been told to wait, so that they do meet."""

        def advance(self, count: int = 1) -> None:
            super().advance(count)
            while not (folder / "waiting").exists():
                time.sleep(0.01)

        def note(self, message: str) -> None:
            super().note(message)
            (folder / "waiting").touch()

    def work(results: Any) -> None:
        progress = Patient()
        run(folder, progress)
        results.put((progress.done, progress.waited))

    results = FORK.Queue()
    jobs = [FORK.Process(target=work, args=(results,)) for _ in range(2)]
    for job in jobs:
        job.start()
    found = sorted(results.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join()
    return {"answered": [done for done, _ in found], "waited": [waited for _, waited in found]}


def together(folder: Path, victim: int | None = None) -> list[int]:
    """Two processes that share a run, one of which may die in the middle of a line; how each of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(index: int) -> int:
        place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        processes = launched()
        if index == victim:
            die_after(1500)
        run(folder, processes=processes)
        return 0

    children = [fork(partial(work, index)) for index in range(2)]
    return [status(child) for child in children]


def shared(folder: Path) -> dict[str, Any]:
    """Each of two processes dies once; then both live."""
    ends = [together(folder, victim) for victim in (1, 0, None)]
    return {"ends": ends, "left": len(list(folder.glob(records.PARTS)))}


def bereft(folder: Path) -> dict[str, Any]:
    """One of two processes dies, and one alone goes on."""
    ends = together(folder, 1)
    parts = len(list(folder.glob(records.PARTS)))
    run(folder)
    return {"ends": ends, "parts": parts, "left": len(list(folder.glob(records.PARTS)))}


def compare_all(folder: Path) -> int:
    """Three reducers, one after the other, as a sweep does."""
    settings = Settings(batch_size=4, max_new_tokens=2, random_seeds=2, timing_pairs=0)
    comparer = Comparer(TransformersBackend(MODEL, PROCESSOR), Cards(count=12), folder, settings)
    for reducer in (create("uniform", keep=9), create("pool", keep=9), create("random", keep=4)):
        if comparer.finished(reducer) is None:
            comparer.compare(reducer)
    return 0


def swept(folder: Path) -> dict[str, Any]:
    """A sweep that is killed again and again, at any moment, and one that is not."""
    calm, moments, deaths = folder / "calm", random.Random(0), 0
    started = time.monotonic()
    compare_all(calm)
    seconds = time.monotonic() - started
    torn = folder / "torn"
    for number in range(KILLS):
        child = fork(
            partial(mortal_sweep, torn, moments.randrange(1, 3000)) if number % 2 else partial(compare_all, torn)
        )
        if number % 2 == 0:
            time.sleep(moments.uniform(0, seconds / 10))
            os.kill(child, signal.SIGKILL)
        deaths += status(child) == -signal.SIGKILL
    end = status(fork(partial(compare_all, torn)))
    results = [
        {path.parent.name: without_seconds(path.parent) for path in sorted(output.glob("*/records.jsonl"))}
        for output in (calm, torn)
    ]
    lines = sum(path.read_bytes().count(b"\n") for path in torn.glob("*/records.jsonl"))
    metrics = [
        {path.parent.name: json.loads(path.read_text()) for path in sorted(output.glob("*/metrics.json"))}
        for output in (calm, torn)
    ]
    return {
        "deaths": deaths,
        "end": end,
        "runs": len(results[0]),
        "lines": lines,
        "same": results[0] == results[1] and metrics[0] == metrics[1] and len(metrics[0]) == 3,
    }


def mortal_sweep(folder: Path, written: int) -> int:
    die_after(written)
    return compare_all(folder)


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [asdict(record) | {"seconds": None} for record in read_records(folder)]


def full(folder: Path) -> dict[str, Any]:
    """A file that the operating system does not let grow beyond 5000 bytes, then the same command again."""

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            run(folder)
        except StorageError as error:
            (folder / "message").write_text(str(error), encoding="utf-8")
            return 7
        return 0

    code = status(fork(work))
    kept = len(read_records(folder))
    run(folder)
    return {"code": code, "kept": kept, "message": (folder / "message").read_text(encoding="utf-8")}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    run(root / "calm")  # first: what is loaded on first use is then there in all forks
    found: dict[str, Any] = {}
    for scenario in (killed, interrupted, doubled, shared, bereft, full):
        folder = root / scenario.__name__
        folder.mkdir()
        found[scenario.__name__] = scenario(folder)
    for name in ("calm", *found):
        found.setdefault(name, {})["records"] = without_seconds(root / name)
        found[name]["written"] = (root / name / records.RECORDS).read_bytes().count(b"\n")
    (root / "swept").mkdir()
    print(json.dumps({**found, "swept": swept(root / "swept")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
