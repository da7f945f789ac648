"""Plugins are found through entry points, and a bad one hurts nobody."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.metadata import EntryPoint

import pytest

import tokenreduce
from tokenreduce import registry
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import Registry


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
    return Registry("reducer", "tokenreduce.reducers", TokenReducer)


GOOD = _entry("random", "tokenreduce_plugins.baselines:Random", "tokenreduce")


def test_the_built_in_reducers_are_all_usable() -> None:
    assert {"none", "no_image", "random", "uniform", "pool", "downsample", "fopru_rank", "fopru_row"} <= set(
        registry.REDUCERS.usable()
    )
    assert tokenreduce.available("models") == ["llava"]
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


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="positions='sideways' is not one of 'original', 'compact'"):
        tokenreduce.create("fopru_row", positions="sideways")


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


def test_a_reducer_knows_its_name() -> None:
    assert registry.REDUCERS.name_of(tokenreduce.create("fopru_row")) == "fopru_row"
