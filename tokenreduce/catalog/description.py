"""What there is to say about an installed plugin, from the plugin itself and from the package that it comes in."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import yaml

from tokenreduce import reducer as interface
from tokenreduce.attach import sites
from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.knobs import nearest
from tokenreduce.models.family import ModelFamily
from tokenreduce.reducer import Geometry, Grid, Step, TokenReducer
from tokenreduce.registry import BENCHMARKS, CONFIGURATIONS, MODELS, REDUCERS, Problem, Registry, required_knobs

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

LLAVA = Geometry(encoder_layers=24, decoder_layers=32, feature_layer=22, class_token=True)
"""LLaVA-1.5-7B, which the published settings are for."""

GRID = Grid(24, 24)
REGISTRIES: dict[str, Registry[Any]] = {registry.kind: registry for registry in (REDUCERS, MODELS, BENCHMARKS)}
BUILT_IN_CONFIGURATIONS = "tokenreduce_conf"


@dataclass(frozen=True)
class Plugin:
    """One plugin as the catalog lists it. Where it can only be made with knobs that have no default, its sites and
    signals are not known."""

    name: str
    kind: str
    package: str
    version: str
    sites: tuple[str, ...]
    signals: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Knob:
    """A setting: its type as the author wrote it, its default (None where it has to be given) and its meaning."""

    name: str
    type: str
    default: str | None
    meaning: str


def plugins() -> tuple[list[Plugin], list[Problem]]:
    """Every usable plugin, by kind and name; and everything that is offered and cannot be used."""
    found = []
    problems = [problem for registry in REGISTRIES.values() for problem in registry.problems()]
    problems += [*CONFIGURATIONS.problems(), *_claims()]
    for registry in REGISTRIES.values():
        for name, plugin in sorted(registry.usable().items()):
            try:
                found.append(_plugin(registry, name, plugin))
            except Exception as error:  # a third party's code may raise anything
                reason = f"cannot be described: {type(error).__name__}: {error}"
                problems.append(Problem(registry.kind, name, registry.origin(name), reason))
    return found, problems


def find(name: str, kind: str | None = None) -> Registry[Any]:
    """The registry that holds ``name``. Raises ``ValueError`` for an unknown name, or one of several kinds."""
    registries = [registry for word, registry in REGISTRIES.items() if kind in (None, word)]
    holding = [registry for registry in registries if name in registry.names() or name in registry.broken()]
    if len(holding) > 1:
        kinds = " and a ".join(registry.kind for registry in holding)
        raise ValueError(f"{name!r} is a {kinds}: say which with --kind")
    if not holding:
        known = [known for registry in registries for known in registry.names()]
        raise ValueError(f"unknown plugin {name!r}: {nearest(name, known)}")
    return holding[0]


def described(reducer: TokenReducer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites at which a reducer acts on LLaVA-1.5, and the kinds of signal that it sees there."""
    steps = reducer.steps(LLAVA)
    acted = _once(site_name(type(step)) for step in steps)
    return acted, _once(type(signal).__name__ for step in steps for signal in step.sees)


def hosted(family: type[ModelFamily]) -> tuple[str, ...]:
    """The sites at which models of a family host reducers, in words."""
    return tuple(site.name for site in sites.SITES if family.hosts(site.kind))


def site_name(step: type[Step]) -> str:
    """A kind of step in words."""
    return next((site.name for site in sites.SITES if site.kind is step), step.__name__)


def knobs(plugin: type) -> list[Knob]:
    """A plugin's settings. Their meaning is taken from lines ``name: meaning`` of the class's docstring, else from the
    documentation of the type; a model family has none."""
    if not dataclasses.is_dataclass(plugin):
        return []
    meanings = {name: text for cls in reversed(plugin.__mro__) for name, text in _meanings(cls)}
    found = []
    for field in dataclasses.fields(plugin):
        declared = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        meaning = meanings.get(field.name) or _type_documentation().get(declared, "")
        found.append(Knob(field.name, declared, _default(field), meaning))
    return found


def presets(kind: str, name: str) -> dict[str, dict[str, Any]]:
    """The configuration files that set other knobs for a plugin: their names and the knobs."""
    found: dict[str, dict[str, Any]] = {}
    packages = [resources.files(BUILT_IN_CONFIGURATIONS), *map(resources.files, CONFIGURATIONS.usable().values())]
    for file in (file for folder in packages for file in _files(folder / kind)):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            warnings.warn(f"{file} cannot be read: {' '.join(str(error).split())}", stacklevel=2)
            continue
        if isinstance(content, dict) and name in (content.pop("name", None), *content.pop("defaults", ())):
            found.setdefault(file.name.removesuffix(".yaml"), content)
    return found


def example(name: str, plugin: type[TokenReducer]) -> TokenReducer | None:
    """A reducer with its defaults. Where some knob has none, as the first preset that sets all such knobs has it;
    None if there is no such preset."""
    needed = set(required_knobs(plugin))
    complete = (settings for settings in ({}, *presets("reducer", name).values()) if needed <= settings.keys())
    settings = next(complete, None)
    return None if settings is None else REDUCERS.create(plugin, **settings)


def _claims() -> list[Problem]:
    """Model families that name a class which another serves: built-in ones come first, then the alphabet decides."""
    problems, owners = [], dict[str, str]()
    for name, family in MODELS.usable().items():
        for model in family.classes:
            if (owner := owners.setdefault(model, name)) != name:
                problems.append(Problem("model", name, MODELS.origin(name), f"{model} is served by {owner!r}"))
    return problems


def _plugin(registry: Registry[Any], name: str, plugin: type) -> Plugin:
    at: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    source = ""
    if issubclass(plugin, TokenReducer):
        source = plugin.paper
        if (reducer := example(name, plugin)) is not None:
            at, signals = described(reducer)
    elif issubclass(plugin, ModelFamily):
        at, source = hosted(plugin), ", ".join(plugin.classes)
    elif issubclass(plugin, Benchmark):
        source = plugin.description
    return Plugin(name, registry.kind, registry.package(name), registry.version(name), at, signals, source)


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return None if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def _meanings(cls: type) -> Iterator[tuple[str, str]]:
    """The lines ``name: meaning``, or ``name, other: meaning``, of a class's own docstring, with what is indented
    below."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    for names, meaning in re.findall(r"^(\w+(?:, \w+)*): +(.+(?:\n[ \t]+.+)*)", text, re.MULTILINE):
        for name in names.split(", "):
            yield name, " ".join(meaning.split())


@cache
def _type_documentation() -> dict[str, str]:
    """What the interface says about the types that knobs share, such as ``Keep``: the text below each."""
    statements = ast.parse(inspect.getsource(interface)).body
    documented = {}
    for statement, following in pairwise(statements):
        match statement, following:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                documented[name] = " ".join(text.split("\n\n")[0].split())
    return documented


def _files(folder: Traversable) -> list[Traversable]:
    if not folder.is_dir():
        return []
    return sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)


def _once(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
