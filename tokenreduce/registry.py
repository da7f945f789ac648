"""Named, lazily loaded plugins: reducers, model families and benchmarks, and the configurations that come with them.

Every plugin, built in or not, is found through a Python entry point of the groups below. A package that fails to
import costs one warning and nothing else.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tokenreduce.knobs import check_knob_names, nearest, with_tuples
from tokenreduce.presets import preset_files, preset_settings

if TYPE_CHECKING:
    from tokenreduce.benchmarks.benchmark import Benchmark
    from tokenreduce.models.family import ModelFamily
    from tokenreduce.reducer import TokenReducer

P = TypeVar("P")
T = TypeVar("T")

INTERFACE = 2
"""The version of what plugins are written against, as docs/interface.md lists it; a change that breaks plugins raises
it."""

CONFIGURATION_PACKAGE = "tokenreduce_conf"
"""The package of this distribution's own configuration files."""
BUILT_IN = "tokenreduce"
"""The distribution whose names no other package can take over."""

_warned: set[str] = set()
"""The packages whose broken plugins were already warned about: one warning each, whatever else is wrong with them."""


@dataclass(frozen=True)
class Problem:
    """Why something that a package offers is not there. ``origin`` is the package and its version."""

    kind: str
    name: str
    origin: str
    reason: str


class EntryPoints(ABC, Generic[P]):
    """What the installed packages offer under one entry-point group.

    ``kind`` is the word for messages. Names are known at once; a package is imported when its name is first asked for.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._loaded: dict[str, P] = {}
        self._broken: dict[str, str] = {}
        self._hidden: list[Problem] = []
        self._lock = threading.RLock()

    @abstractmethod
    def _check(self, loaded: Any) -> P:
        """What was loaded. Raises ``TypeError`` unless it is of use."""

    def names(self) -> list[str]:
        """Every name that is not known to be broken, sorted; imports nothing."""
        return sorted(name for name in self._entries if name not in self._broken)

    def get(self, name: str) -> P:
        """What ``name`` stands for. Raises ``ValueError`` for an unknown or broken name."""
        with self._lock:
            if name not in self._loaded and name not in self._broken:
                if name not in self._entries:
                    raise ValueError(f"unknown {self.kind} {name!r}: {nearest(name, self.names())}")
                self._load(name)
            if name in self._broken:
                raise ValueError(f"{self.kind} {name!r} of {self.origin(name)} cannot be used: {self._broken[name]}")
            return self._loaded[name]

    def usable(self) -> dict[str, P]:
        """Everything that loads, by name, built-in names first; each one that does not is warned about once."""
        found = {}
        for name in self._entries:
            with self._lock:
                if name not in self._loaded and name not in self._broken:
                    self._load(name)
                if name in self._loaded:
                    found[name] = self._loaded[name]
        return found

    def package(self, name: str) -> str:
        """The package that ``name`` comes from."""
        return _package(self._entries[name])

    def version(self, name: str) -> str:
        """The version of that package."""
        distribution = self._entries[name].dist
        return distribution.version if distribution else ""

    def origin(self, name: str) -> str:
        """The package and version that ``name`` comes from."""
        return _origin(self._entries[name])

    def broken(self) -> dict[str, str]:
        """Why each plugin that could not be loaded so far could not be."""
        return dict(self._broken)

    def problems(self) -> list[Problem]:
        """Everything that is offered and not there: broken plugins, and those whose name is taken."""
        self.usable()
        broken = [Problem(self.kind, name, self.origin(name), reason) for name, reason in self._broken.items()]
        return [*broken, *self._hidden]

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in sorted(_unique(entry_points(group=self.group)), key=_built_in_first):
            if entry.name in found:
                reason = f"the name belongs to {_package(found[entry.name])}"
                self._hidden.append(Problem(self.kind, entry.name, _origin(entry), reason))
                warnings.warn(f"{self.kind} {entry.name!r} of {_package(entry)} is ignored: {reason}", stacklevel=2)
            else:
                found[entry.name] = entry
        return found

    def _load(self, name: str) -> None:
        entry = self._entries[name]
        try:
            self._loaded[name] = self._check(entry.load())
        except (Exception, SystemExit) as error:  # a third party's import may raise anything
            self._broken[name] = f"{type(error).__name__}: {error}"
            if _package(entry) not in _warned:
                _warned.add(_package(entry))
                message = f"{self.kind} {name!r} of {_package(entry)} is skipped: {self._broken[name]}"
                warnings.warn(message, stacklevel=3)


class Registry(EntryPoints[type[T]], Generic[T]):
    """The plugins of one group: classes that derive from ``base`` and fulfil ``rule``, which raises ``TypeError``.

    A base given as ``module:Class`` is imported with the first plugin: until then names are all that is needed.
    """

    def __init__(self, kind: str, group: str, base: type[T] | str, rule: Callable[[type], None]) -> None:
        super().__init__(kind, group)
        self._given_base = base
        self._rule = rule

    @cached_property
    def _base(self) -> type[T]:
        given = self._given_base
        found: type[T] = pkgutil.resolve_name(given) if isinstance(given, str) else given
        return found

    def _check(self, loaded: Any) -> type[T]:
        if not (isinstance(loaded, type) and issubclass(loaded, self._base)):
            name = loaded.__qualname__ if isinstance(loaded, type) else repr(loaded)
            raise TypeError(f"{name} is not a subclass of {self._base.__module__}.{self._base.__qualname__}")
        if inspect.isabstract(loaded):
            missing = ", ".join(sorted(getattr(loaded, "__abstractmethods__", ())))
            raise TypeError(f"{loaded.__qualname__} does not define {missing}")
        self._rule(loaded)
        return loaded

    def create(self, name: str | type[T], **knobs: Any) -> T:
        """An instance of the plugin of this name, or of this class, with these settings.

        Raises ``ValueError`` for an unknown name or knob, a required one that is not given, or a value that does not
        fit, and ``TypeError`` for what is neither a name nor a class of such plugins.
        """
        if not isinstance(name, str | type):
            made = isinstance(name, self._base)
            advice = "it is set up already, use it as it is" if made else f"give a name, such as {self.names()[0]!r}"
            raise TypeError(f"{name!r} is neither the name nor the class of a {self.kind}: {advice}")
        cls = self.get(name) if isinstance(name, str) else self._check(name)
        check_knob_names(cls, knobs)
        if missing := [knob for knob in required_knobs(cls) if knob not in knobs]:
            label = name if isinstance(name, str) else name.__qualname__
            raise ValueError(f"{self.kind} {label!r} needs a value for {', '.join(map(repr, missing))}")
        return cls(**with_tuples(cls, knobs))

    def name_of(self, instance: T) -> str:
        """The name under which the class of ``instance`` is registered, else the class's own name."""
        cls = type(instance)
        for name, entry in self._entries.items():
            if self._loaded.get(name) is cls or entry.value == f"{cls.__module__}:{cls.__qualname__}":
                return name
        return cls.__qualname__


class Reducers(Registry["TokenReducer"]):
    """The reducers, of which some have further names for some of their settings: their presets."""

    def create(self, name: str | type[TokenReducer], **knobs: Any) -> TokenReducer:
        """As :meth:`Registry.create`; a preset's settings are those that ``knobs`` do not say otherwise."""
        if not isinstance(name, str) or name in self._entries:
            return super().create(name, **knobs)
        presets = preset_files([CONFIGURATION_PACKAGE, *CONFIGURATIONS.usable().values()])
        if name not in presets:
            raise ValueError(f"unknown {self.kind} {name!r}: {nearest(name, [*self.names(), *presets])}")
        return super().create(**{**preset_settings(name, presets, self._entries), **knobs})


class ConfigurationPackages(EntryPoints[ModuleType]):
    """Packages of configuration files, laid out as this framework's own: a folder for every group."""

    def _check(self, loaded: Any) -> ModuleType:
        if not isinstance(loaded, ModuleType) or loaded.__file__ is None or not hasattr(loaded, "__path__"):
            raise TypeError(f"{getattr(loaded, '__name__', loaded)} is no package with an __init__.py")
        return loaded


def _unique(entries: Iterable[EntryPoint]) -> list[EntryPoint]:
    """One entry per (package, name): an editable install can be visible twice on the path."""
    return list({(_package(entry), entry.name): entry for entry in entries}.values())


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown package"


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _built_in_first(entry: EntryPoint) -> tuple[bool, str, str]:
    return _package(entry) != BUILT_IN, _package(entry), entry.name


def frozen_dataclass(plugin: type) -> None:
    """The rule for reducers and benchmarks, whose fields are their knobs.

    A class that only inherits its knobs may do without the decorator; one that declares some may not.
    """
    parameters = getattr(plugin, "__dataclass_params__", None)
    undecorated = "__dataclass_params__" not in vars(plugin) and _declares_fields(plugin)
    if parameters is None or not parameters.frozen or undecorated:
        raise TypeError(f"{plugin.__qualname__} is no frozen dataclass: decorate it with @dataclass(frozen=True)")
    for field in dataclasses.fields(plugin):
        if field.default_factory is not dataclasses.MISSING:
            field.default_factory()  # raises here, and not where every plugin's defaults are listed


def required_knobs(plugin: type) -> list[str]:
    """The fields of a dataclass that have no default."""
    return [
        field.name
        for field in dataclasses.fields(plugin)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _declares_fields(plugin: type) -> bool:
    return any("ClassVar" not in str(declared) for declared in inspect.get_annotations(plugin).values())


def names_its_classes(plugin: type) -> None:
    """The rule for model families: they are looked up by the classes that they serve."""
    classes = getattr(plugin, "classes", None)
    if not isinstance(classes, tuple) or not classes or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"{plugin.__qualname__}.classes is {classes!r}, not a tuple of names of transformers classes")


REDUCERS = Reducers("reducer", "tokenreduce.reducers", "tokenreduce.reducer:TokenReducer", frozen_dataclass)
MODELS: Registry[ModelFamily] = Registry(
    "model", "tokenreduce.models", "tokenreduce.models.family:ModelFamily", names_its_classes
)
BENCHMARKS: Registry[Benchmark] = Registry(
    "benchmark", "tokenreduce.benchmarks", "tokenreduce.benchmarks.benchmark:Benchmark", frozen_dataclass
)
CONFIGURATIONS = ConfigurationPackages("configuration", "tokenreduce.configs")

_BY_KIND: dict[str, Registry[Any]] = {"reducers": REDUCERS, "models": MODELS, "benchmarks": BENCHMARKS}


def create(name: str | type[TokenReducer], **knobs: Any) -> TokenReducer:
    """A reducer by its name, ``create("fopru_rank", keep=144)``, by a preset's, ``create("fastv_k2_r50")``, or of a
    class, ``create(FastV)``; ``knobs`` go before a preset's own.

    Raises ``ValueError`` for an unknown name, knob or value, and ``TypeError`` for anything else than a name or class.
    """
    return REDUCERS.create(name, **knobs)


def available(kind: str) -> list[str]:
    """The names of the installed ``"reducers"``, ``"models"`` or ``"benchmarks"``."""
    if kind not in _BY_KIND:
        raise ValueError(f"unknown kind {kind!r}: {nearest(kind, list(_BY_KIND))}")
    return _BY_KIND[kind].names()
