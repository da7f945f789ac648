"""``python -m tokenreduce``: one run, from the command line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from tokenreduce.configuration import CONFIG_MODULE, CONFIG_NAME, check_overrides, register_plugins

SUCCESS, BAD_INPUT, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's own, and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    statuses: list[int] = []

    def job(config: DictConfig) -> None:
        # Reported here and not by Hydra, so that the other jobs of a sweep go on.
        with reported(statuses):
            print(config)

    entry = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(job)
    with plain_warnings(), reported(statuses):
        register_plugins()
        check_overrides([argument for argument in arguments if "=" in argument and not argument.startswith("-")])
        with replaced_arguments(arguments):
            entry()
    return max(statuses, default=SUCCESS)


@contextmanager
def reported(statuses: list[int]) -> Iterator[None]:
    """Turn what a user can mend into a few lines on standard error and an exit status."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        statuses.append(BAD_INPUT)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues where this one stopped", file=sys.stderr)
        statuses.append(INTERRUPTED)
    except SystemExit as exit_:  # how Hydra ends after a configuration that does not compose
        statuses.append(BAD_INPUT if exit_.code else SUCCESS)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show a warning as its sentence: the place in the code says nothing to somebody at a terminal."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


@contextmanager
def replaced_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads the process's arguments and takes no others."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
