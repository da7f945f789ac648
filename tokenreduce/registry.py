"""Named, lazily loaded plugins: reducers, model families and benchmarks.

Every plugin, built in or not, is found through a Python entry point of the groups below. A package that fails to
import costs one warning and nothing else.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.knobs import check_knob_names, nearest, with_tuples
from tokenreduce.models.family import ModelFamily
from tokenreduce.reducer import TokenReducer

T = TypeVar("T")

BUILT_IN = "tokenreduce"
"""The distribution whose names no other package can take over."""

_warned: set[str] = set()
"""The packages whose broken plugins were already warned about: one warning each, whatever else is wrong with them."""


class Registry(Generic[T]):
    """The plugins of one entry-point group.

    ``kind`` is the word for messages, ``base`` the class that every plugin must derive from. Names are known at
    once; a plugin's package is imported when its name is first asked for.
    """

    def __init__(self, kind: str, group: str, base: type[T]) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._loaded: dict[str, type[T]] = {}
        self._broken: dict[str, str] = {}
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Every name that is not known to be broken, sorted; imports nothing."""
        return sorted(name for name in self._entries if name not in self._broken)

    def get(self, name: str) -> type[T]:
        """The plugin's class. Raises ``ValueError`` for an unknown or broken name."""
        with self._lock:
            if name not in self._loaded and name not in self._broken:
                if name not in self._entries:
                    raise ValueError(f"unknown {self.kind} {name!r}: {nearest(name, self.names())}")
                self._load(name)
            if name in self._broken:
                raise ValueError(f"{self.kind} {name!r} of {self.origin(name)} cannot be used: {self._broken[name]}")
            return self._loaded[name]

    def usable(self) -> dict[str, type[T]]:
        """Every plugin that loads, by name; each one that does not is warned about once."""
        found = {}
        for name in self.names():
            with self._lock:
                if name not in self._loaded:
                    self._load(name)
                if name in self._loaded:
                    found[name] = self._loaded[name]
        return found

    def create(self, name: str, **knobs: Any) -> T:
        """An instance with these settings. Raises ``ValueError`` for an unknown name or knob, or a value that does
        not fit."""
        cls = self.get(name)
        check_knob_names(cls, knobs)
        return cls(**with_tuples(cls, knobs))

    def name_of(self, instance: T) -> str:
        """The name under which the class of ``instance`` is registered, else the class's own name."""
        for name, entry in self._entries.items():
            if entry.value == f"{type(instance).__module__}:{type(instance).__qualname__}":
                return name
        return type(instance).__qualname__

    def origin(self, name: str) -> str:
        """The package and version that ``name`` comes from."""
        distribution = self._entries[name].dist
        return f"{distribution.name} {distribution.version}" if distribution else "an unknown package"

    def broken(self) -> dict[str, str]:
        """Why each plugin that could not be loaded so far could not be."""
        return dict(self._broken)

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in sorted(_unique(entry_points(group=self.group)), key=_built_in_first):
            if entry.name in found:
                owner = found[entry.name].dist
                warnings.warn(
                    f"{self.kind} {entry.name!r} of {_package(entry)} is ignored: the name belongs to "
                    f"{owner.name if owner else 'another package'}",
                    stacklevel=2,
                )
            else:
                found[entry.name] = entry
        return found

    def _load(self, name: str) -> None:
        entry = self._entries[name]
        try:
            plugin = entry.load()
            if not (isinstance(plugin, type) and issubclass(plugin, self._base)):
                raise TypeError(f"{entry.value} is not a subclass of {self._base.__module__}.{self._base.__qualname__}")
        except (Exception, SystemExit) as error:  # a third party's import may raise anything
            self._broken[name] = f"{type(error).__name__}: {error}"
            if _package(entry) not in _warned:
                _warned.add(_package(entry))
                message = f"{self.kind} {name!r} of {_package(entry)} is skipped: {self._broken[name]}"
                warnings.warn(message, stacklevel=3)
        else:
            self._loaded[name] = plugin


def _unique(entries: Iterable[EntryPoint]) -> list[EntryPoint]:
    """One entry per (package, name): an editable install can be visible twice on the path."""
    return list({(_package(entry), entry.name): entry for entry in entries}.values())


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown package"


def _built_in_first(entry: EntryPoint) -> tuple[bool, str, str]:
    return _package(entry) != BUILT_IN, _package(entry), entry.name


REDUCERS: Registry[TokenReducer] = Registry("reducer", "tokenreduce.reducers", TokenReducer)
MODELS: Registry[ModelFamily] = Registry("model", "tokenreduce.models", ModelFamily)
BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "tokenreduce.benchmarks", Benchmark)

_BY_KIND: dict[str, Registry[Any]] = {"reducers": REDUCERS, "models": MODELS, "benchmarks": BENCHMARKS}


def create(name: str, **knobs: Any) -> TokenReducer:
    """A reducer by name, ``create("fopru_rank", keep=144)``. Raises ``ValueError`` for an unknown name, knob or
    value."""
    return REDUCERS.create(name, **knobs)


def available(kind: str) -> list[str]:
    """The names of the installed ``"reducers"``, ``"models"`` or ``"benchmarks"``."""
    if kind not in _BY_KIND:
        raise ValueError(f"unknown kind {kind!r}: {nearest(kind, list(_BY_KIND))}")
    return _BY_KIND[kind].names()
