"""What the commands say on standard error: a warning as its sentence, and what a user can mend in a few lines."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SUCCESS, BAD_INPUT = 0, 2


def refused(reason: object) -> int:
    """Say what is wrong with what a user gave; the exit status for it."""
    print(f"error: {reason}", file=sys.stderr)
    return BAD_INPUT


def wants_everything() -> bool:
    """True where a user wants whole tracebacks: Hydra's own switch."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextmanager
def plain_warnings(shown: bool = True) -> Iterator[None]:
    """Show a warning once, as its sentence: the place in the code says nothing to somebody at a terminal."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if shown:
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
