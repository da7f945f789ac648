"""``python -m tokenreduce.catalog`` as a user meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenreduce.catalog import description
from tokenreduce.catalog.__main__ import main
from tokenreduce.reducer import AtProjector, Geometry, Selection, Step, TokenReducer, VisualTokens
from tokenreduce.registry import BENCHMARKS, MODELS, REDUCERS, Problem
from tokenreduce.signals import QuestionEmbeddings

Run = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    def row(self, name: str) -> list[str]:
        """The words of the line that begins with ``name``."""
        return next(line.split() for line in self.out.splitlines() if line.split()[:1] == [name])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        return Outcome(main(arguments), *capsys.readouterr())

    return run


def test_list_names_every_plugin_with_its_package_site_signals_and_paper(run: Run) -> None:
    listed = run("list")
    assert listed.status == 0
    first_words = [line.split()[0] for line in listed.out.splitlines() if line.strip()]
    assert {*REDUCERS.names(), *MODELS.names(), *BENCHMARKS.names()} <= set(first_words)
    kind, package, _, *rest = listed.row("fopru_row")[1:]
    assert (kind, package, rest) == ("reducer", "tokenreduce", ["projector", "EncoderAttention", "2411.14164"])
    assert "LlavaForConditionalGeneration" in listed.row("llava")


def test_list_can_be_narrowed(run: Run) -> None:
    out = run("list", "fopru*").out
    assert "fopru_row" in out
    assert "divprune" not in out
    out = run("list", "--kind", "benchmark").out
    assert "scenes" in out
    assert "fopru_row" not in out


def test_list_gives_the_reason_why_something_is_not_usable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("reducer", "wrecked", "others 1.0", "ModuleNotFoundError: No module named 'gone'")
    monkeypatch.setattr(REDUCERS, "problems", lambda: [problem])
    monkeypatch.setattr(Awkward, "steps", lambda *_: 1 // 0)
    monkeypatch.setattr(REDUCERS, "usable", lambda: {"pool": REDUCERS.get("pool"), "uniform": Awkward})
    listed = run("list")
    assert listed.row("wrecked")[1:4] == ["reducer", "others", "1.0"]
    assert "No module named 'gone'" in listed.out
    assert "cannot be described: ZeroDivisionError" in listed.out
    assert listed.row("pool")[1] == "reducer"


def test_show_explains_every_knob(run: Run) -> None:
    shown = run("show", "pyramiddrop").out
    assert "PyramidDrop" in shown
    assert "2410.17247" in shown
    assert "whose attention: that which the ``next`` layer would pay" in " ".join(shown.split())
    assert shown.count("(0.5, 0.25, 0.125)") == 1
    assert "pyramiddrop_270" in shown
    for knob in description.knobs(REDUCERS.get("pyramiddrop")):
        assert knob.meaning


def test_show_tells_which_knobs_have_to_be_given(run: Run) -> None:
    assert "(required)" in run("show", "chain").row("reducers")


@pytest.mark.parametrize("name", ["llava", "scenes"])
def test_show_knows_models_and_benchmarks(run: Run, name: str) -> None:
    shown = run("show", name).out
    assert shown.startswith(f"{name}: a ")
    sites = "sites    input, inside the encoder, encoder output, projector, language model"
    assert (sites in shown) == (name == "llava")


def test_a_name_that_nobody_has_is_told_with_the_near_one(run: Run) -> None:
    for command in ("show", "check"):
        outcome = run(command, "fopru_ro")
        assert (outcome.status, outcome.err) == (2, "error: unknown plugin 'fopru_ro': did you mean 'fopru_row'?\n")


def test_check_passes_a_reducer_and_a_benchmark_that_behave(run: Run) -> None:
    for name, knobs in (("uniform", ["keep=5"]), ("scenes", ["seed=3"])):
        checked = run("check", name, *knobs)
        assert checked.status == 0, checked.out
        assert "checks passed" in checked.out
        assert "FAILED" not in checked.out


def test_check_holds_a_family_and_a_reducer_to_the_invariants_on_a_checkpoint(
    run: Run, checkpoint: Callable[[str], Path]
) -> None:
    directory = str(checkpoint("llava"))
    reducer, family = (run("check", name, "--model", directory) for name in ("uniform", "llava"))
    assert (reducer.status, family.status) == (0, 0), reducer.out + family.out
    assert "passed   identity changes nothing, keeping everything at the encoder output" in family.out
    assert "passed   dropping equals masking, dropping half of the tokens" in family.out


def test_check_holds_a_family_to_the_invariants_on_the_checkpoints_that_it_brings(run: Run) -> None:
    checked = run("check", "paligemma")
    assert checked.status == 0, checked.out
    for name in ("paligemma", "paligemma2"):
        assert f"passed   {name}: identity changes nothing, keeping everything at the projector" in checked.out


def test_check_says_which_model_a_family_needs(
    run: Run, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoint("llava")
    monkeypatch.setattr(MODELS.get("llava"), "recipes", dict)
    assert "give a checkpoint that it serves, --model DIRECTORY" in run("check", "llava").err
    other = run("check", "qwen2_5_vl", "--model", str(written))
    assert other.status == 2
    assert "is a LlavaForConditionalGeneration, which the family does not serve" in other.err


def test_a_class_that_another_family_serves_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    llava = MODELS.get("llava")
    monkeypatch.setattr(MODELS, "usable", lambda: {"llava": llava, "gemma3": llava})
    assert "LlavaForConditionalGeneration is served by 'llava'" in run("list").out


@dataclass(frozen=True)
class Awkward(TokenReducer):
    """Keeps a half that changes from call to call."""

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=0.5)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.randperm(len(tokens))[: tokens.keep].sort().values)


@dataclass(frozen=True)
class OfAll(TokenReducer):
    """Keeps what is likest to the question in all of a picture, or twice as much of the first tile alone."""

    steady: bool = True

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=0.4, scope="picture", sees=(QuestionEmbeddings(),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        kept = tokens.best((tokens.features @ tokens[QuestionEmbeddings()].mean(0)).float())
        return Selection(kept if self.steady or len(tokens.span.tiles) == 1 else kept[1:])


def test_check_shows_a_method_of_whole_pictures_some_that_are_cut_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REDUCERS._loaded, "uniform", OfAll)
    checked = run("check", "uniform")
    assert checked.status == 0, checked.out
    assert "passed   equals the literal sequence, on a model with tiles and frames" in checked.out
    checked = run("check", "uniform", "steady=false")
    assert checked.status == 1
    assert "FAILED   counts are exact, on a model with tiles and frames" in checked.out
    assert "passed   counts are exact, on a model with a class token" in checked.out


def test_check_names_the_broken_promise(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REDUCERS._loaded, "uniform", Awkward)
    checked = run("check", "uniform")
    assert checked.status == 1
    assert "FAILED   runs repeat" in checked.out
    assert "logits of a second run are not bit-identical" in checked.out
    assert "passed   counts are exact" in checked.out
    assert "checks failed" in checked.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uniform", "keep"], "'keep' sets no knob: write KNOB=VALUE"),
        (["uniform", "keep=[1"], "'keep=[1' has no readable value"),
        (["uniform", "kep=0.5"], "did you mean 'keep'"),
        (["uniform", "keep=0"], "keep=0 is not a number of visual tokens"),
        (["uniform", "--model", "nowhere/at/all"], "is no directory"),
    ],
    ids=str,
)
def test_check_refuses_bad_input(run: Run, arguments: list[str], message: str) -> None:
    outcome = run("check", *arguments)
    assert outcome.status == 2
    assert message in outcome.err


def test_new_refuses_a_name_that_cannot_be_with_the_remedy(run: Run, tmp_path: Path) -> None:
    refused = {
        "fopru_row": "the reducer 'fopru_row' is there already, in tokenreduce",
        "json": "a Python module 'json' is there already",
        "MyMethod": "such as 'my_method'",
        "3 tokens": "such as 'tokens'",
        "class": "such as 'class_reducer'",
        "a__b": "such as 'a_b'",
        "../up": "such as 'up'",
    }
    for name, message in refused.items():
        outcome = run("new", name, "--output", str(tmp_path))
        assert (outcome.status, message in outcome.err) == (2, True), outcome.err
    assert list(tmp_path.iterdir()) == []


def test_new_leaves_alone_what_is_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my_method").mkdir()
    outcome = run("new", "my_method", "--output", str(tmp_path))
    assert outcome.status == 2
    assert "is there already: choose another name, or another place with --output" in outcome.err
    assert list((tmp_path / "my_method").iterdir()) == []


def test_the_tables_are_printed(run: Run) -> None:
    assert run("table").out.startswith("| reducer |")
    assert run("table", "models").out.startswith("| family |")


def test_a_plugin_of_two_kinds_is_asked_for_by_its_kind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BENCHMARKS, "names", lambda: ["pool"])
    outcome = run("show", "pool")
    assert (outcome.status, "say which with --kind" in outcome.err) == (2, True)
    assert run("show", "pool", "--kind", "reducer").status == 0


def test_knobs_without_a_docstring_of_their_own_have_their_types() -> None:
    knobs: dict[str, Any] = {knob.name: knob for knob in description.knobs(REDUCERS.get("fopru_row"))}
    assert knobs["keep"].meaning.startswith("How much to keep")
    assert (knobs["include_cls"].type, knobs["include_cls"].default, knobs["include_cls"].meaning) == (
        "bool",
        "False",
        "",
    )
