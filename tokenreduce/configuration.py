"""What the command line accepts: Hydra's nodes, made from plugins' dataclasses, and answers to mistyped settings."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenreduce.budget import Budget
from tokenreduce.choices import PLUGINS, check_options, files
from tokenreduce.knobs import nearest
from tokenreduce.registry import CONFIGURATION_PACKAGE, CONFIGURATIONS

CONFIG_MODULE = CONFIGURATION_PACKAGE
CONFIG_NAME = "config"
RUN_SETTINGS: dict[str, dict[str, Any]] = {
    "reducer": {},
    "benchmark": {"limit": None, "prompt": "{question}", "max_new_tokens": 16},
}
"""What every node of a group has beside its plugin's own knobs."""


class PluginConfigurations(SearchPathPlugin):
    """Configuration files of other packages. They stand behind our own and behind the nodes made from plugins, so that
    no file takes over a name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="schema", path="structured://")  # Hydra's own name for it
        for name, package in CONFIGURATIONS.usable().items():
            search_path.append(provider=CONFIGURATIONS.origin(name), path=f"pkg://{package.__name__}")


def register_plugins() -> None:
    """Give Hydra a node for every installed reducer and benchmark, so that ``reducer=NAME`` needs no file, and the
    configuration files of their packages."""
    for group, registry in PLUGINS.items():
        for name, plugin in registry.usable().items():
            knobs = knob_defaults(plugin)
            for knob in knobs.keys() & RUN_SETTINGS[group].keys():
                origin = registry.origin(name)
                warnings.warn(
                    f"{group} {name!r} of {origin}: its knob {knob!r} cannot be set on the command line", stacklevel=2
                )
            node = {"name": name, **knobs, **RUN_SETTINGS[group]}
            try:
                ConfigStore.instance().store(name, OmegaConf.create(node), group, provider=registry.origin(name))
            except OmegaConfBaseException as error:
                summary = str(error).splitlines()[0]
                warnings.warn(
                    f"{group} {name!r} of {registry.origin(name)} cannot be used on the command line: {summary}",
                    stacklevel=2,
                )
    Plugins.instance().register(PluginConfigurations)
    _point_out_hiddenfiles()


def _point_out_hiddenfiles() -> None:
    """Warn of every configuration file of a plugin's package whose name is taken, by a plugin or by another file."""
    plugins = {
        f"{group}/{name}": registry.origin(name) for group, registry in PLUGINS.items() for name in registry.names()
    }
    taken = {**plugins, **dict.fromkeys(files(resources.files(CONFIG_MODULE)), "tokenreduce")}
    for name, package in CONFIGURATIONS.usable().items():
        origin = CONFIGURATIONS.origin(name)
        for file in files(resources.files(package)):
            if file in taken:
                message = f"the configuration {file}.yaml of {origin} is ignored: the name belongs to {taken[file]}"
                warnings.warn(message, stacklevel=3)
            taken.setdefault(file, origin)


def knob_defaults(plugin: type) -> dict[str, Any]:
    """The knobs of a plugin's dataclass with their defaults, OmegaConf's ``???`` for those that have none."""
    return {field.name: _default(field) for field in dataclasses.fields(plugin) if field.init}


def knobs_of(node: DictConfig, group: str) -> dict[str, Any]:
    """The plugin's own knobs out of its composed node. Raises ``ValueError`` for a required one that was not given."""
    for name in map(str, node):
        if OmegaConf.is_missing(node, name):
            raise ValueError(f"{group} {node.name!r} needs a value for {name!r}: add {group}.{name}=VALUE")
    values = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    return {name: value for name, value in values.items() if name != "name" and name not in RUN_SETTINGS[group]}


def budget_of(node: DictConfig) -> Budget | None:
    """The budget that is asked for, None where it has no value."""
    if node.value is None:
        return None
    if node.currency is None:
        raise ValueError(f"budget.value={node.value} of what? Choose budget=tokens, budget=layer_mean or budget=flops")
    return Budget(node.currency, node.value)


def own_folder(arguments: Sequence[str]) -> Path | None:
    """The caller's own configuration directory, given as Hydra takes it. Raises ``ValueError`` if it is none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    folder: Path | None = parser.parse_known_args(list(arguments))[0].config_dir
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--config-dir {str(folder)!r} is no directory")
    return folder


def check_overrides(overrides: Sequence[str], own: Path | None = None) -> DictConfig:
    """The configuration that these compose, Hydra's own included; a sweep's with its first choices. ``own`` is a
    further configuration directory.

    Raises ``ValueError`` for a choice or a setting that does not exist, with the nearest one that does.
    Hydra would refuse them too, but it knows neither the near name nor which package a plugin comes from.
    """
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        try:
            parsed = OverridesParser.create().parse_overrides(list(overrides))
        except HydraException as error:
            raise ValueError(f"{error}\nQuote a value that holds special characters: NAME='\"VALUE\"'") from error
        fixed = _search(own)
        try:
            fixed += [_first_choice(override, own) for override in parsed]
            config = compose(CONFIG_NAME, fixed, return_hydra_config=True)
        except HydraException as error:
            _explain(parsed, own)
            cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
            raise ValueError(f"{error}{cause}") from error
        except yaml.YAMLError as error:
            raise ValueError(f"a configuration file cannot be read: {' '.join(str(error).split())}") from error
        if any(each.is_sweep_override() or each.type is not OverrideType.CHANGE for each in parsed):
            _explain(parsed, own)
        _check_output(Path(str(config.output)))
    return config


def _first_choice(override: Override, own: Path | None) -> str:
    """The override itself, or the first of those that it stands for in a sweep."""
    if not override.is_sweep_override() or not (values := _values(override, own)):
        return str(override.input_line)
    return f"{override.get_key_element()}={values[0]}"


def _search(own: Path | None) -> list[str]:
    """The override by which Hydra looks into the caller's ``own`` directory too."""
    return [f"hydra.searchpath=['file://{own.absolute()}']"] if own else []


def _options(group: str, own: Path | None) -> list[str]:
    """Everything that can be chosen in a group, in the caller's ``own`` directory too."""
    mine = (file.rpartition("/") for file in files(own)) if own else ()
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    return sorted({*known, *(name for folder, _, name in mine if folder == group)})


def _values(override: Override, own: Path | None) -> list[str]:
    """What an override stands for: one value, those of a sweep, or the options of a group that a pattern fits; none
    for a range of numbers. Raises ``ValueError`` for a pattern that fits none."""
    value = override.value()
    if isinstance(value, Glob):
        group = override.key_or_group
        names: list[str] = value.filter(_options(group, own))
        if not names:
            raise ValueError(f"no {group} is called like {', '.join(value.include)}")
        return names
    if override.is_sweep_override():
        return [str(each) for each in override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    return [str(value)]


@dataclasses.dataclass(frozen=True)
class SweepPlace:
    """A job's place in its sweep.

    folder:    the sweep's own, for its report and its jobs' outcomes.
    overrides: what this job was started with.
    alone:     whether no other job of the sweep runs at the same time.
    """

    folder: Path
    number: int
    overrides: tuple[str, ...]
    alone: bool


def sweep_place() -> SweepPlace | None:
    """The place of the job that is running now; None outside of a sweep."""
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        return None
    return SweepPlace(
        Path(hydra.sweep.dir),
        hydra.job.num,
        tuple(hydra.overrides.task),
        hydra.launcher._target_.endswith(".BasicLauncher"),
    )


def sweep_folder(arguments: Sequence[str], config: DictConfig) -> Path | None:
    """The folder of the sweep that the command asks for, the same whenever the same is asked; None if it asks for none.

    What says only how and where jobs run (``launcher``, ``tracking``, ``output``, Hydra's own) makes no other sweep.
    """
    if not {"-m", "--multirun"} & set(arguments) and config.hydra.mode is not RunMode.MULTIRUN:
        return None
    how = ("-", "hydra", "launcher", "tracking", "output")
    asked = sorted(argument for argument in arguments if not argument.startswith(how))
    asked += [f"{name}={value}" for name, value in (config.hydra.sweeper.get("params") or {}).items()]
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:8]
    study = config.hydra.runtime.choices.get("experiment")
    return Path(config.output) / "-".join(["sweep", *([study] if study else []), digest])


def _explain(overrides: Sequence[Override], own: Path | None) -> None:
    """Raise ``ValueError`` where one of the overrides, a sweep's choices included, names what there is not."""
    choices = _choices(overrides, own)
    for group, values in choices.items():
        check_options(group, values, _options(group, own))
    for override in overrides:
        if override.key_or_group not in choices and not override.key_or_group.startswith("hydra"):
            _check_setting(override, choices, own)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING


def _choices(overrides: Iterable[Override], own: Path | None) -> dict[str, list[str]]:
    """For every configuration group that is overridden, the options that are asked for."""
    groups = GlobalHydra.instance().config_loader().list_groups("")
    found = {}
    for override in overrides:
        group = override.key_or_group
        if group in groups and group != "hydra" and override.type is not OverrideType.DEL:
            found[group] = _values(override, own)
    return found


def _check_setting(override: Override, choices: dict[str, list[str]], own: Path | None) -> None:
    """Follow an override's dotted key into the configuration that it will be applied to."""
    key = override.key_or_group
    group = key.split(".")[0]
    if override.type is not OverrideType.CHANGE and group not in PLUGINS:
        return  # adding and deleting are Hydra's own; a plugin's knobs are all there already
    others = _search(own)
    others += [f"{name}={values[0]}" for name, values in choices.items() if name != group]  # a study may choose too
    for choice in choices.get(group, [None]):
        node: Any = compose(CONFIG_NAME, others if choice is None else [*others, f"{group}={choice}"])
        place = ""
        for part in key.split("."):
            if not isinstance(node, DictConfig):
                raise ValueError(f"unknown setting {key!r}: {place} has no parts")
            if part not in set(node):  # asked directly, a node denies a knob that has no value yet
                known = [str(name) for name in node if name != "name"]
                if place in PLUGINS:
                    plus = (
                        ""
                        if override.type is OverrideType.CHANGE
                        else " (Hydra's '+' is not needed: every knob is there)"
                    )
                    raise ValueError(f"{place} {node.name!r} has no knob {part!r}: {nearest(part, known)}{plus}")
                raise ValueError(f"unknown setting {key!r}: {nearest(part, known)}")
            place = f"{place}.{part}" if place else part
            node = None if OmegaConf.is_missing(node, part) else node[part]


def _check_output(folder: Path) -> None:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"output={str(folder)!r} cannot be a directory: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output={str(folder)!r} cannot be written to; give another directory: output=DIRECTORY")
