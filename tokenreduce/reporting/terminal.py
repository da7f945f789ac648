"""Progress of a run: bars at a terminal, plain lines anywhere else."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class TerminalProgress:
    """The phases of an evaluation, one under the other. A context manager, so that the terminal is given back.

    Where there is no terminal, a line at least every ``pause`` seconds says how far it is: a job that only writes a log
    shall not look dead.
    """

    def __init__(self, console: Console, pause: float = 30.0) -> None:
        self._console, self._pause, self._over = console, pause, threading.Event()
        self._bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[remark]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._phase, self._total, self._done, self._found = "", 0, 0, 0
        self._started = self._spoken = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        if self._console.is_terminal:
            self._bars.start()
        else:
            threading.Thread(target=self._report, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._bars.stop()

    def _report(self) -> None:
        while not self._over.wait(max(0.0, self._spoken + self._pause - time.monotonic())):
            if time.monotonic() - self._spoken >= self._pause:
                self._spoken = time.monotonic()
                if self._phase:
                    self._console.print(self._line(), highlight=False)

    def _line(self) -> str:
        """How far the phase is, how quickly it goes, and how long it will still take."""
        done, left = self._done - self._found, self._total - self._done
        seconds = time.monotonic() - self._started
        line = f"{self._phase}: {self._done} of {self._total} after {seconds:.0f} s"
        if not done:
            return line
        rate = done / seconds
        return f"{line}, {rate:{'.0f' if rate >= 10 else '.2g'}} a second, {left / rate:.0f} s left"

    def start(self, phase: str, total: int, done: int = 0) -> None:
        self._phase, self._total, self._done, self._found = phase, total, done, done
        self._started = self._spoken = time.monotonic()
        remark = f"{done} from an earlier run" if done else ""
        if self._console.is_terminal:
            self._task = self._bars.add_task(phase, total=total, completed=done, remark=remark)
        else:
            self._console.print(f"{phase}: {total}" + (f", {remark}" if remark else ""), highlight=False)

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._task is not None:
            self._bars.advance(self._task, count)

    def finish(self) -> None:
        if self._task is not None:
            self._bars.stop_task(self._task)
            self._task = None
        elif not self._console.is_terminal:
            seconds = time.monotonic() - self._started
            self._console.print(f"{self._phase}: {self._done} of {self._total} done, {seconds:.1f} s", highlight=False)
            self._phase = ""

    def note(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False)
