"""Presets of reducers in Python: configuration files that give a method's published settings a name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from importlib import resources
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenreduce.knobs import nearest

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_GROUP = "reducer"
_ENDING = ".yaml"


def preset_files(packages: Iterable[ModuleType | str]) -> dict[str, Traversable]:
    """The reducers' presets by name; where two packages have one of a name, the first one's."""
    found: dict[str, Traversable] = {}
    for package in packages:
        folder = resources.files(package) / _GROUP
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name.endswith(_ENDING):
                found.setdefault(file.name.removesuffix(_ENDING), file)
    return found


def preset_settings(name: str, files: Mapping[str, Traversable], plugins: Container[str]) -> dict[str, Any]:
    """A preset's knobs, and under ``name`` its method, as the command line composes them.

    Raises ``ValueError`` for a file that cannot be read, or that builds on something other than a method or a preset.
    """
    try:
        # As on the command line, where one knob may be read from another.
        composed = OmegaConf.create({_GROUP: _composed(name, files, plugins, ())})
        settings = cast(dict[str, dict[str, Any]], OmegaConf.to_container(composed, resolve=True))[_GROUP]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"the preset {name!r} cannot be read: {' '.join(str(error).split())}") from error
    if "name" not in settings:
        raise ValueError(f"the preset {name!r} names no method: begin {files[name]} with 'defaults: [METHOD]'")
    return settings


def _composed(
    name: str, files: Mapping[str, Traversable], plugins: Container[str], within: tuple[str, ...]
) -> dict[str, Any]:
    """A file's content upon that of its defaults, in their order."""
    if name in plugins:
        return {"name": name}
    if name in within or name not in files:
        chain = " -> ".join((*within, name))
        reason = "it builds on itself" if name in within else f"unknown {_GROUP} {name!r}: {nearest(name, list(files))}"
        raise ValueError(f"the preset {chain} cannot be used: {reason}")
    content: Any = OmegaConf.to_container(OmegaConf.create(files[name].read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise ValueError(f"the preset {name!r} cannot be used: {files[name]} holds no settings by name")
    defaults = content.pop("defaults", None) or []
    if others := [each for each in defaults if not isinstance(each, str)]:
        raise ValueError(f"the preset {name!r} builds on {others[0]!r}, which works on the command line only")
    settings: dict[str, Any] = {}
    for each in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        settings |= content if each == "_self_" else _composed(each, files, plugins, (*within, name))
    return settings
