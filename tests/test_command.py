"""The command's first word, what it answers without torch, and Hydra's habits."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tokenreduce import __main__ as command
from tokenreduce.configuration import check_overrides, own_folder, register_plugins
from tokenreduce.job import tracking_of

QUICK = """
import sys
from tokenreduce.__main__ import main
status = main(sys.argv[1:])
print(status, sorted({"torch", "transformers"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["--version"], 0), (["reprot"], 2), (["reducer=fopru_ro"], 2), (["-m", "budget=layer,none"], 2)],
)
def test_what_needs_no_model_is_answered_without_torch(words: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", QUICK, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{status} []"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("reprot", "error: unknown tool 'reprot': did you mean 'report'?; settings are given as NAME=VALUE"),
        ("reducer=fopru_ro", "error: unknown reducer 'fopru_ro': did you mean 'fopru_row'?"),
        ("reducer=pool,fopru_ro", "error: unknown reducer 'fopru_ro': did you mean 'fopru_row'?"),
    ],
)
def test_a_word_that_there_is_not_is_answered_with_the_near_one(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([word]) == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_the_tools_are_the_first_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["catalog", "list", "fopru_row"]) == 0
    assert "fopru_row" in capsys.readouterr().out
    assert command.main(["report", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    (script,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "tokenreduce")
    assert script.load() is command.main


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A configuration directory of the caller's own: a reducer's settings, and a study."""
    (tmp_path / "reducer").mkdir()
    (tmp_path / "reducer" / "mine.yaml").write_text("defaults: [fopru_row]\nkeep: 0.5\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper: {params: {reducer: 'mine,fopru_row'}}\n"
    )
    return tmp_path


@pytest.mark.parametrize("flag", ["-cd {}", "--config-dir {}", "--config-dir={}"])
def test_a_configuration_directory_of_ones_own(flag: str, own: Path) -> None:
    register_plugins()
    folder = own_folder(flag.format(own).split())
    assert check_overrides(["reducer=mine"], folder).reducer.keep == 0.5
    assert dict(check_overrides(["experiment=mine"], folder).hydra.sweeper.params) == {"reducer": "mine,fopru_row"}
    with pytest.raises(ValueError, match="unknown reducer 'mein': did you mean 'mine'"):
        check_overrides(["reducer=mein"], folder)
    with pytest.raises(ValueError, match="'fopru_row' has no knob 'kep': did you mean 'keep'"):
        check_overrides(["reducer=mine", "reducer.kep=1"], folder)


def test_a_configuration_directory_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["-cd", "nowhere", "reducer=mine"]) == 2
    assert capsys.readouterr().err == "error: --config-dir 'nowhere' is no directory\n"


def test_options_are_chosen_by_a_pattern() -> None:
    register_plugins()
    assert check_overrides(["reducer=glob(fopru_r*)"]).reducer.name == "fopru_rank"
    with pytest.raises(ValueError, match=r"no reducer is called like fopru_x\*"):
        check_overrides(["reducer=glob(fopru_x*)"])


def test_tracking_can_be_taken_out() -> None:
    register_plugins()
    assert not tracking_of(check_overrides(["~tracking"]), None).enabled
