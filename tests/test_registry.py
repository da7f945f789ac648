"""Plugins are found through entry points, and a bad one hurts nobody."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import tokenreduce
from tokenreduce import registry
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import ConfigurationPackages, Registry, frozen_dataclass, names_its_classes


class _Distribution:
    version = "9.9"

    def __init__(self, name: str) -> None:
        self.name = name


def _entry(name: str, value: str, package: str) -> EntryPoint:
    entry = EntryPoint(name, value, "tokenreduce.reducers")
    vars(entry)["dist"] = _Distribution(package)
    return entry


def _registry(monkeypatch: pytest.MonkeyPatch, *entries: EntryPoint) -> Registry[TokenReducer]:
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "entry_points", lambda group: list(entries))
    return Registry("reducer", "tokenreduce.reducers", TokenReducer, frozen_dataclass)


GOOD = _entry("random", "tokenreduce_plugins.baselines:Random", "tokenreduce")


def test_the_built_in_reducers_are_all_usable() -> None:
    assert {"none", "no_image", "random", "uniform", "pool", "downsample", "fopru_rank", "fopru_row"} <= set(
        registry.REDUCERS.usable()
    )
    assert "llava" in tokenreduce.available("models")
    assert "scenes" in tokenreduce.available("benchmarks")


def test_names_cost_no_import() -> None:
    code = "import sys, tokenreduce; tokenreduce.available('reducers'); print('tokenreduce_plugins' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_an_unknown_name_offers_the_near_one() -> None:
    with pytest.raises(ValueError, match="unknown reducer 'fopru_ro': did you mean 'fopru_row'"):
        tokenreduce.create("fopru_ro")
    with pytest.raises(ValueError, match="unknown kind 'reducer': did you mean 'reducers'"):
        tokenreduce.available("reducer")


def test_an_unknown_knob_offers_the_near_one() -> None:
    with pytest.raises(ValueError, match="has no knob 'kep': did you mean 'keep'"):
        tokenreduce.create("fopru_row", kep=0.5)


def test_a_required_knob_is_asked_for() -> None:
    with pytest.raises(ValueError, match="reducer 'chain' needs a value for 'reducers'"):
        tokenreduce.create("chain")


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="positions='sideways' is not one of 'original', 'compact'"):
        tokenreduce.create("fopru_row", positions="sideways")


def test_a_class_does_as_well_as_its_name() -> None:
    fastv = type(tokenreduce.create("fastv"))
    assert tokenreduce.create(fastv, keep=0.25) == tokenreduce.create("fastv", keep=0.25)
    with pytest.raises(ValueError, match="has no knob 'kep': did you mean 'keep'"):
        tokenreduce.create(fastv, kep=0.25)
    with pytest.raises(ValueError, match="reducer 'Chain' needs a value for 'reducers'"):
        tokenreduce.create(type(tokenreduce.create("chain", reducers=[{"name": "none"}])))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "None is neither the name nor the class of a reducer: give a name, such as"),
        (0.5, "0.5 is neither the name nor the class of a reducer"),
        (tokenreduce.create("pool"), r"Pool\(.*\) is neither .*: it is set up already, use it as it is"),
        (int, "int is not a subclass of tokenreduce.reducer.TokenReducer"),
        (TokenReducer, "TokenReducer does not define steps"),
    ],
)
def test_what_is_neither_name_nor_class_is_refused(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tokenreduce.create(given)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_package:Thing", "ModuleNotFoundError"),
        ("tokenreduce_plugins.baselines:NoSuchThing", "AttributeError"),
        ("tokenreduce.reducer:Grid", "not a subclass of tokenreduce.reducer.TokenReducer"),
    ],
)
def test_a_broken_plugin_costs_one_warning(monkeypatch: pytest.MonkeyPatch, value: str, reason: str) -> None:
    reducers = _registry(monkeypatch, GOOD, _entry("bad", value, "their-package"))
    with pytest.warns(UserWarning, match=f"'bad' of their-package is skipped: .*{reason}"):
        assert list(reducers.usable()) == ["random"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(reducers.usable()) == ["random"]
        assert reducers.names() == ["random"]
        with pytest.raises(ValueError, match=r"'bad' of their-package 9\.9 cannot be used"):
            reducers.get("bad")
    assert reason in reducers.broken()["bad"]
    assert [(problem.name, problem.origin) for problem in reducers.problems()] == [("bad", "their-package 9.9")]


THEIRS = """
from dataclasses import dataclass, field
from tokenreduce.reducer import ScoreReducer, TokenReducer

@dataclass(frozen=True)
class Unfinished(ScoreReducer):
    def steps(self, geometry): return []

class Undecorated(TokenReducer):
    keep: int = 3
    def steps(self, geometry): return []

@dataclass(frozen=True)
class Raising(TokenReducer):
    keep: int = field(default_factory=lambda: 1 // 0)
    def steps(self, geometry): return []

@dataclass(frozen=True)
class Parent(TokenReducer):
    keep: int = 3
    def steps(self, geometry): return []

class Heir(Parent):
    pass

instance = Parent()
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's module, with the mistakes that are easily made."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Unfinished", "Unfinished does not define score"),
        ("Undecorated", "decorate it with @dataclass"),
        ("Raising", "ZeroDivisionError"),
        ("instance", "is not a subclass of tokenreduce.reducer.TokenReducer"),
    ],
)
def test_a_mistake_is_told_on_first_use(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    reducers = _registry(monkeypatch, GOOD, _entry("bad", f"theirs:{name}", "their-package"))
    with pytest.warns(UserWarning, match=reason):
        assert list(reducers.usable()) == ["random"]


@pytest.mark.usefixtures("theirs")
def test_a_subclass_that_declares_no_knobs_needs_no_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    reducers = _registry(monkeypatch, _entry("heir", "theirs:Heir", "their-package"))
    assert reducers.create("heir", keep=5).knobs()["keep"] == 5


@pytest.mark.parametrize("classes", [None, (), "LlavaForConditionalGeneration", (int,)])
def test_a_family_of_no_class_is_refused(classes: object) -> None:
    with pytest.raises(TypeError, match="not a tuple of names of transformers classes"):
        names_its_classes(type("Nameless", (), {"classes": classes}))


def test_only_a_package_holds_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [_entry(name.partition(".")[0], name, name) for name in ("tokenreduce_conf", "json.decoder")]
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    with pytest.warns(UserWarning, match=r"json.decoder is no package with an __init__\.py"):
        assert list(ConfigurationPackages("configuration", "tokenreduce.configs").usable()) == ["tokenreduce_conf"]


def test_built_in_plugins_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _entry("a_first_name", "tokenreduce_plugins.baselines:Uniform", "their-package")
    assert list(_registry(monkeypatch, other, GOOD).usable()) == ["random", "a_first_name"]


def test_a_package_with_two_broken_plugins_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrecked = [_entry(name, "no_such_package:Thing", "their-package") for name in ("bad", "worse")]
    reducers = _registry(monkeypatch, GOOD, *wrecked)
    with pytest.warns(UserWarning) as caught:
        assert list(reducers.usable()) == ["random"]
    assert len(caught) == 1
    assert set(reducers.broken()) == {"bad", "worse"}


def test_a_built_in_name_is_never_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    thief = _entry("random", "tokenreduce_plugins.baselines:Uniform", "a-thief")
    reducers = _registry(monkeypatch, thief, GOOD)
    with pytest.warns(UserWarning, match="'random' of a-thief is ignored: the name belongs to tokenreduce"):
        assert reducers.get("random").__name__ == "Random"
    assert reducers.origin("random") == "tokenreduce 9.9"
    (problem,) = reducers.problems()
    assert (problem.name, problem.origin, problem.reason) == (
        "random",
        "a-thief 9.9",
        "the name belongs to tokenreduce",
    )


def test_a_reducer_knows_its_name() -> None:
    assert registry.REDUCERS.name_of(tokenreduce.create("fopru_row")) == "fopru_row"
