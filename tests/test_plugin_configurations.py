"""Configuration files in other people's packages are choices like our own, and take over no name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from tokenreduce import configuration, registry
from tokenreduce.configuration import CONFIG_MODULE, CONFIG_NAME, check_overrides, register_plugins
from tokenreduce.registry import ConfigurationPackages

THEIRS = "an entry-point group of this test alone"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts configuration packages on the path, each a mapping of files to contents, and announces them."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_warned", set())

    def install(**packages: dict[str, str]) -> None:
        for name, files in packages.items():
            for file, content in {"__init__.py": "", **files}.items():
                place = tmp_path / name / file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(content)
        entries = [EntryPoint(name, name, THEIRS) for name in packages]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: entries if group == THEIRS else entry_points(group=group)
        )
        monkeypatch.setattr(configuration, "CONFIGURATIONS", ConfigurationPackages("configuration", THEIRS))

    return install


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return compose(CONFIG_NAME, list(overrides))


def test_a_packages_preset_is_a_choice(install: Install) -> None:
    install(
        a_method={
            "reducer/pool_9.yaml": "name: pool\nkeep: 9\n",
            "model/ours.yaml": "defaults: [tiny, _self_]\nrevision: x\n",
        }
    )
    register_plugins()
    config = composed("reducer=pool_9", "model=ours")
    assert (config.reducer.name, config.reducer.keep, config.model.path, config.model.revision) == (
        "pool",
        9,
        "tiny",
        "x",
    )
    with pytest.raises(ValueError, match="unknown reducer 'pool_8': did you mean 'pool_9'"):
        check_overrides(["reducer=pool_8"])


def test_no_file_takes_over_a_name(install: Install) -> None:
    install(
        a_thief={
            "reducer/pool.yaml": "name: none\n",
            "model/tiny.yaml": "path: theirs\n",
            "config.yaml": "output: x\n",
        },
        another={"reducer/mine.yaml": "name: pool\n"},
        the_last={"reducer/mine.yaml": "name: none\n"},
    )
    with pytest.warns(UserWarning, match="is ignored: the name belongs to") as caught:
        register_plugins()
    assert {str(warning.message).split()[2] for warning in caught} == {
        "reducer/pool.yaml",
        "model/tiny.yaml",
        "config.yaml",
        "reducer/mine.yaml",
    }
    config = composed("reducer=pool", "model=tiny")
    assert (config.reducer.name, config.model.path, config.output) == ("pool", "tiny", "outputs")
    assert composed("reducer=mine").reducer.name == "pool"


def test_a_package_that_fails_at_import_costs_one_warning_and_no_other_choice(install: Install) -> None:
    install(
        wrecked={"__init__.py": "raise RuntimeError('out of order')", "reducer/lost.yaml": "name: pool\n"},
        whole={"reducer/found.yaml": "name: pool\n"},
    )
    with pytest.warns(UserWarning) as caught:
        register_plugins()
    assert ["out of order" in str(warning.message) for warning in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert composed("reducer=found").reducer.name == "pool"
        with pytest.raises(ValueError, match="unknown reducer 'lost'"):
            check_overrides(["reducer=lost"])


def test_a_file_that_is_no_yaml_is_named(install: Install) -> None:
    install(a_slip={"reducer/garbled.yaml": "name: [pool\n"})
    register_plugins()
    assert composed("reducer=pool").reducer.name == "pool"
    with pytest.raises(ValueError, match=r"configuration file cannot be read: .*garbled\.yaml"):
        check_overrides(["reducer=garbled"])
