"""The package of a new reducer, made from the files in ``template/``."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Iterator
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from tokenreduce.registry import INTERFACE, REDUCERS

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SUFFIX = ".template"
PLACE_OF_NAME = "NAME"
"""What stands in a template's path for the name."""


def create_package(name: str, parent: Path) -> Path:
    """Make a package with one reducer, its preset and its tests, and return its folder, ``parent / name``.

    Raises ``ValueError`` for a name that is taken or cannot be a module's, and ``FileExistsError`` where the folder
    is there already.
    """
    check_name(name)
    folder = parent / name
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another name, or another place with --output")
    values = {
        "name": name,
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "version": version("tokenreduce"),
        "interface": str(INTERFACE),
    }
    for place, template in _templates(resources.files("tokenreduce.catalog") / "template"):
        file = folder / place.replace(PLACE_OF_NAME, name).removesuffix(SUFFIX)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(template).substitute(values), encoding="utf-8")
    return folder


def check_name(name: str) -> None:
    """Raise ``ValueError`` for a name that a new reducer, its module and its package cannot have."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"{name!r} cannot be the name of a module: write lower-case letters, digits and single underscores, "
            f"a letter first, such as {_suggestion(name)!r}"
        )
    if name in REDUCERS.names():
        raise ValueError(f"the reducer {name!r} is there already, in {REDUCERS.origin(name)}: choose another name")
    if importlib.util.find_spec(name) is not None:
        raise ValueError(
            f"a Python module {name!r} is there already, which the package would hide: choose another name"
        )


def _suggestion(name: str) -> str:
    """The nearest name that is allowed."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    near = re.sub(r"^[0-9_]+", "", "_".join(words))
    return f"{near}_reducer" if keyword.iskeyword(near) else near or "my_method"


def _templates(folder: Traversable, place: str = "") -> Iterator[tuple[str, str]]:
    """Every template's path, relative to the outermost folder, and its text."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _templates(entry, f"{place}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            yield place + entry.name, entry.read_text(encoding="utf-8")
