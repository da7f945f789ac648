"""Digests of what a plugin's answers come from: the code of its classes, and the files that its settings name.

A plugin is a reducer or a benchmark. Nothing is listed by hand: code is found by following imports, files by looking at
settings.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints
from weakref import WeakKeyDictionary

_LIBRARY = __name__.partition(".")[0]
_ANSWERS_NOTHING = ("catalog", "reporting", "testing")
"""The parts of this package that no run's answers come from."""
_CHUNK = 1 << 22
_SETTLED = 1_000_000_000
"""Nanoseconds after which any further change of a file shows in its times."""

_known: dict[tuple[Path, int, int, int, int], str] = {}
"""Digests of files by place, inode, size and times."""
_typed_in: WeakKeyDictionary[type, str] = WeakKeyDictionary()
"""What stands for each class that has no file."""


def of(plugin: Any) -> str:
    """Digest of everything that a plugin's answers come from: class, settings, code, the files that its settings name,
    and this package."""
    settings = json.dumps([_settings(plugin), files(plugin)], sort_keys=True, default=str)
    return _of_lines([qualified(type(plugin)), settings, code(plugin), library()])


def code(plugin: Any) -> str:
    """Digest of the code of a plugin and of all plugins that it holds; see :func:`code_of`."""
    return _of_lines({code_of(type(part)) for part in _parts(plugin)})


def code_of(cls: type) -> str:
    """Digest of the modules that a class's behaviour comes from.

    These are the whole top-level package of the class, those of its bases that are plugins too, and all that these
    import, directly or not: by source where it is being worked on, by version where it is installed. The standard
    library and this package do not count. A class that was typed in and has no file is like no other.
    """
    homes = [_home(each) for each in cls.__mro__ if each is cls or _is_plugin(each)]
    if homes[0] is None:
        return _typed_in.setdefault(cls, uuid.uuid4().hex)
    sources = {home.name: home for home in homes if home is not None}
    own = {_LIBRARY}.union(*(home.distributions() for home in sources.values()))
    versions = set()
    unread = list(sources.values())
    while unread:
        for path in unread.pop().files().values():
            for name in _imported(path.read_bytes()) - sources.keys():
                module = _found(name, path.parent)
                installed = module.distributions() if module else frozenset()
                if installed and not installed & own:
                    versions |= {f"{each} {_version(each)}" for each in installed}
                elif module:
                    sources[name] = module
                    unread.append(module)
    return _of_lines([*versions, *(f"{name} {_of_contents(module.files())}" for name, module in sources.items())])


def files(plugin: Any) -> dict[str, str]:
    """Digests of the files and folders that a plugin's settings name, by those names.

    Any text that is a path here and now counts, except settings of a few fixed choices and those that this package's
    own classes declare, which are words. A folder around the working directory does not count: results are in it.
    """
    found = {}
    for part in _parts(plugin):
        words = _words(type(part))
        for text in (text for name, value in _settings(part).items() if name not in words for text in _texts(value)):
            path = Path(os.path.expanduser(text))
            if os.path.isfile(path):
                found[text] = file_digest(path)
            elif os.path.isdir(path) and not Path.cwd().is_relative_to(path.resolve()):
                found[text] = folder_digest(path)
    return found


@cache
def library() -> str:
    """Digest of this package, except what only looks at answers. Read once: loaded code does not change."""
    modules = _below(Path(__file__).parent, ".py").items()
    return _of_contents({name: path for name, path in modules if name.partition("/")[0] not in _ANSWERS_NOTHING})


def file_digest(path: Path) -> str:
    """Digest of a file's content. It is read again only when its size, times or place on the disk have changed."""
    status = path.stat()
    key = (path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key in _known:
        return _known[key]
    with path.open("rb") as file:
        found = digest(iter(lambda: file.read(_CHUNK), b""))
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED:
        _known[key] = found
    return found


def folder_digest(folder: Path) -> str:
    """Digest of the names and contents of the files below a folder, except hidden and compiled ones."""
    return _of_lines(f"{name}:{file_digest(path)}" for name, path in _below(folder).items())


def digest(parts: Iterable[bytes]) -> str:
    """Digest of these bytes, one part behind the other."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def qualified(cls: type) -> str:
    """A class's module and name."""
    return f"{cls.__module__}:{cls.__qualname__}"


@dataclass(frozen=True)
class _Module:
    """A top-level package, which has folders, or a module of one file."""

    name: str
    folders: tuple[Path, ...]
    file: Path

    def files(self) -> dict[str, Path]:
        """Its source files by their names within it."""
        if not self.folders:
            return {self.file.name: self.file}
        return {name: path for folder in self.folders for name, path in _below(folder, ".py").items()}

    def distributions(self) -> frozenset[str]:
        """The installed distributions that it belongs to; none where it is being worked on."""
        place = (self.folders or (self.file,))[0]
        installed = {"site-packages", "dist-packages"} & set(place.parts)
        return frozenset(_distributions().get(self.name, ())) if installed else frozenset()


def _home(cls: type) -> _Module | None:
    """The top-level package or the module of a class; None where it has no file."""
    try:
        file = Path(inspect.getfile(cls))
    except (OSError, TypeError):
        return None
    module = sys.modules[cls.__module__]
    name = module.__spec__.name if module.__spec__ else module.__name__  # a script's own is __main__
    top = name.partition(".")[0]
    folders = tuple(map(Path, getattr(sys.modules.get(top), "__path__", ())))
    if any(file.is_relative_to(folder) for folder in folders):
        return _Module(top, folders, file)
    return _Module(name, (), file)


def _found(name: str, beside: Path) -> _Module | None:
    """The module that an import of ``name`` gives: as Python finds it, or beside the file that imports it. None for one
    that is not there, has no file, or does not count."""
    if name == _LIBRARY or name in sys.stdlib_module_names:
        return None
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is None and name not in sys.modules:
        spec = importlib.util.find_spec(name)
    spec = spec or PathFinder.find_spec(name, [str(beside)])
    if spec is None:
        return None
    folders = tuple(map(Path, spec.submodule_search_locations or ()))
    file = Path(spec.origin or "")
    return _Module(name, folders, file) if folders or file.is_file() else None


@cache
def _imported(source: bytes) -> frozenset[str]:
    """The top-level names that a module imports by statement, or by function with a name written out."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # a template, or of another Python: nothing that can be imported
        return frozenset()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        function = getattr(call.func, "attr", getattr(call.func, "id", None))
        if function in ("import_module", "__import__") and call.args and isinstance(call.args[0], ast.Constant):
            names.append(str(call.args[0].value))
    return frozenset(name.partition(".")[0] for name in names)


def _is_plugin(cls: type) -> bool:
    """True for a class of another package that builds on one of this package."""
    return not _of_library(cls) and any(_of_library(base) for base in cls.__mro__)


def _of_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == _LIBRARY


def _parts(plugin: Any) -> list[Any]:
    """A plugin, and all instances of dataclasses that it holds, directly or not."""
    found: list[Any] = []
    waiting = [plugin, *(plugin.parts() if hasattr(plugin, "parts") else ())]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += each
        elif is_dataclass(each) and not isinstance(each, type):
            found.append(each)
            waiting += [getattr(each, field.name, None) for field in fields(each)]
    return found or [plugin]


def _settings(plugin: Any) -> dict[str, Any]:
    if hasattr(plugin, "knobs"):
        return dict(plugin.knobs())
    return {field.name: getattr(plugin, field.name) for field in fields(plugin)} if is_dataclass(plugin) else {}


def _words(cls: type) -> set[str]:
    """The settings of a class that are words and never name a file."""
    declared = {name for base in cls.__mro__ if _of_library(base) for name in inspect.get_annotations(base)}
    return declared | {name for name, hint in get_type_hints(cls).items() if get_origin(hint) is Literal}


def _texts(value: Any) -> Iterator[str]:
    """The texts and paths within a setting."""
    if isinstance(value, str | os.PathLike):
        yield os.fspath(value)
    elif isinstance(value, Mapping):
        yield from (text for each in value.values() for text in _texts(each))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from (text for each in value for text in _texts(each))


def _below(folder: Path, ending: str = "") -> dict[str, Path]:
    """The files below a folder by their relative names, in order; hidden and compiled ones do not count."""
    found = {}
    seen = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        within = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        real = os.path.realpath(place)
        inner[:] = within if real not in seen else []  # links may lead in a circle
        seen.add(real)
        for path in (Path(place, name) for name in names if name.endswith(ending) and not name.startswith(".")):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _of_contents(files: Mapping[str, Path]) -> str:
    """Digest of files' names and contents. They are always read: code is small, and edited in quick succession."""
    return digest(part for name, path in files.items() for part in (f"{name}\n".encode(), path.read_bytes()))


def _of_lines(lines: Iterable[str]) -> str:
    """Digest of lines, whatever their order."""
    return digest(f"{line}\n".encode() for line in sorted(lines))


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


@cache
def _version(distribution: str) -> str:
    return version(distribution)
