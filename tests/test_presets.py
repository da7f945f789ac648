"""A preset's name works in Python as on the command line, whichever package it comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from transformers import LlavaForConditionalGeneration

import tokenreduce
from tokenreduce import registry
from tokenreduce.configuration import CONFIG_MODULE, CONFIG_NAME, knobs_of, register_plugins
from tokenreduce.registry import ConfigurationPackages
from tokenreduce.testing import prompts

THEIRS = "an entry-point group of this test alone"
PRESETS = sorted(file.stem for file in (Path(__file__).parents[1] / "conf" / "reducer").glob("*.yaml"))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a package of presets on the path, and announces it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_presets", raising=False)

    def install(**presets: str) -> None:
        folder = tmp_path / "their_presets" / "reducer"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        for name, content in presets.items():
            (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
        entry = EntryPoint("their_presets", "their_presets", THEIRS)
        monkeypatch.setattr(
            registry, "entry_points", lambda group: [entry] if group == THEIRS else entry_points(group=group)
        )
        monkeypatch.setattr(registry, "CONFIGURATIONS", ConfigurationPackages("configuration", THEIRS))

    return install


def test_every_preset_is_what_the_command_line_makes_of_it() -> None:
    register_plugins()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        for name in PRESETS:
            node = compose(CONFIG_NAME, [f"reducer={name}"]).reducer
            composed = registry.REDUCERS.create(node.name, **knobs_of(node, "reducer"))
            assert tokenreduce.create(name) == composed
    assert len(PRESETS) > 20


def test_knobs_go_before_the_presets_own() -> None:
    assert tokenreduce.create("fastv_k3_r75", keep=7) == tokenreduce.create("fastv", layer=3, keep=7)
    with pytest.raises(ValueError, match="FastV has no knob 'kep': did you mean 'keep'"):
        tokenreduce.create("fastv_k3_r75", kep=7)


def test_an_unknown_name_offers_the_near_preset() -> None:
    with pytest.raises(ValueError, match="unknown reducer 'fopru_row_14': did you mean 'fopru_row_144'"):
        tokenreduce.create("fopru_row_14")


def test_a_preset_reduces_and_is_a_member_of_a_chain(llava: LlavaForConditionalGeneration) -> None:
    inputs = prompts(llava)
    with tokenreduce.reduce_tokens(llava, "fopru_row_144", keep=12) as reduction:
        llava(**inputs)
    assert reduction.samples[0].entering == 12
    chain = tokenreduce.create("chain", reducers=[{"name": "fastv_k2_r50", "keep": 0.25}])
    assert chain == tokenreduce.create("chain", reducers=[tokenreduce.create("fastv", layer=2, keep=0.25)])


def test_presets_of_other_packages(install: Callable[..., None]) -> None:
    install(
        plain="name: pool\nkeep: 9\n",
        built="defaults: [plain]\nkeep: 4\n",
        below="defaults: [_self_, plain]\nkeep: 4\n",
        own="defaults: [fastv]\nlayer: 3\nkeep: ${.layer}\n",
        fastv_k2_r50="name: pool\n",  # the name is taken
        pool="name: none\n",
    )
    pool, fastv = tokenreduce.create("pool", keep=9), tokenreduce.create("fastv", layer=3, keep=3)
    assert tokenreduce.create("plain") == tokenreduce.create("below") == pool
    assert tokenreduce.create("built") == tokenreduce.create("pool", keep=4)
    assert tokenreduce.create("own") == fastv
    assert tokenreduce.create("fastv_k2_r50") == tokenreduce.create("fastv", layer=2, keep=0.5)
    assert type(tokenreduce.create("pool")) is type(pool)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [pool\n", "the preset 'theirs' cannot be read: .*"),
        ("keep: ${.nothing}\nname: pool\n", "the preset 'theirs' cannot be read: .*nothing"),
        ("keep: 3\n", r"the preset 'theirs' names no method: begin .*theirs\.yaml with 'defaults: \[METHOD\]'"),
        ("- pool\n", r"the preset 'theirs' cannot be used: .*theirs\.yaml holds no settings by name"),
        ("defaults: [theirs]\n", "the preset theirs -> theirs cannot be used: it builds on itself"),
        ("defaults: [fastv_k2_r5]\n", "theirs -> fastv_k2_r5 cannot be used: unknown reducer .*'fastv_k2_r75'"),
        ("defaults: [/budget: tokens]\n", "builds on {'/budget': 'tokens'}, which works on the command line only"),
    ],
)
def test_a_preset_that_cannot_be_used_is_named(install: Callable[..., None], content: str, message: str) -> None:
    install(theirs=content)
    with pytest.raises(ValueError, match=message):
        tokenreduce.create("theirs")
