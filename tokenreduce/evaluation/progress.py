"""Progress of a long evaluation, reported to whoever called it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Phases come one after the other: ``start``, any number of ``advance``, ``finish`` (also when the phase fails)."""

    def start(self, phase: str, total: int, done: int = 0) -> None:
        """A phase begins; ``done`` of its ``total`` parts were found finished."""

    def advance(self, count: int = 1) -> None: ...

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        """One line for the user, such as that another job is being waited for."""


class Silent:
    """Shows nothing."""

    def start(self, phase: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int = 1) -> None: ...

    def finish(self) -> None: ...

    def note(self, message: str) -> None: ...
