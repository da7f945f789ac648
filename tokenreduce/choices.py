"""What can be chosen on the command line, by name alone: neither a plugin nor torch is imported for it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from tokenreduce.knobs import nearest
from tokenreduce.registry import BENCHMARKS, CONFIGURATION_PACKAGE, CONFIGURATIONS, REDUCERS, Registry

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

PLUGINS: dict[str, Registry[Any]] = {"reducer": REDUCERS, "benchmark": BENCHMARKS}
"""The configuration groups whose options are plugins too."""

_OWN_FOLDERS = ("-cd", "--config-dir", "-cp", "--config-path")
"""Hydra's flags that bring options of the caller's own."""


def files(folder: Traversable, place: str = "") -> Iterator[str]:
    """The configuration files below a folder, as ``group/name``."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from files(entry, f"{place}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield place + entry.name.removesuffix(".yaml")


def options() -> dict[str, list[str]]:
    """The options of every configuration group, those of all installed packages."""
    found = {group: set(registry.names()) for group, registry in PLUGINS.items()}
    packages = [CONFIGURATION_PACKAGE, *(package.__name__ for package in CONFIGURATIONS.usable().values())]
    for package in packages:
        for group, _, name in (file.rpartition("/") for file in files(resources.files(package))):
            if group:
                found.setdefault(group, set()).add(name)
    return {group: sorted(names) for group, names in sorted(found.items())}


def check(words: Sequence[str]) -> None:
    """Raise ``ValueError`` for a choice that does not exist among the words of a command line.

    It is about plain names; what else may stand there, and options of the caller's own, are Hydra's to find.
    """
    if any(word.split("=")[0] in _OWN_FOLDERS for word in words):
        return
    asked = [word.split("=", 1) for word in words if re.fullmatch(r"[a-z]+=[\w.,-]+", word)]
    known = options() if asked else {}
    for group, values in asked:
        if group in known:
            check_options(group, values.split(","), known[group])


def check_options(group: str, asked: Iterable[str], known: list[str]) -> None:
    """Raise ``ValueError`` for an option of a group that is not known, with the nearest one that is."""
    for value in asked:
        if value in known or value == "null":
            continue
        if group in PLUGINS and (reason := PLUGINS[group].broken().get(value)):
            raise ValueError(f"{group} {value!r} of {PLUGINS[group].origin(value)} cannot be used: {reason}")
        hint = f" (a checkpoint's directory is given as model.path={value})" if group == "model" else ""
        raise ValueError(f"unknown {group} {value!r}: {nearest(value, known)}{hint}")


def overview(tools: dict[str, str]) -> str:
    """The help of the command, with its ``tools`` and what each does."""
    groups = [
        textwrap.fill(f"{group:<11}{', '.join(names)}", 110, initial_indent="  ", subsequent_indent=" " * 13)
        for group, names in options().items()
    ]
    return "\n".join(
        [
            "Reduce the visual tokens of a vision-language model, and see what that costs and saves.",
            "",
            "  tokenreduce [GROUP=OPTION | NAME=VALUE]...       compare one method with the unreduced model and chance",
            "  tokenreduce -m [GROUP=OPTION,OPTION...]...       compare every combination, and write a report",
            *(f"  tokenreduce {tool:<10} ...{'':<24}{purpose}" for tool, purpose in tools.items()),
            "",
            "Options of every group:",
            "",
            *groups,
            "",
            "Settings: --cfg job prints all of them with their values, 'tokenreduce catalog show NAME' what a method's",
            "mean. --version, --hydra-help, and -sc install=bash for completion in the shell.",
            "",
            "Examples:",
            "",
            "  tokenreduce reducer=fopru_row reducer.keep=0.25",
            "  tokenreduce -m reducer=fopru_row,divprune,fastv budget.value=0.5,0.25",
            "  tokenreduce experiment=budgets launcher=joblib",
            "  tokenreduce reducer=fopru_rank model.path=DIRECTORY runtime=cuda benchmark.limit=200",
        ]
    )
