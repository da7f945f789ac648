"""Sweeps as users meet them: what is done is not done again, a failure costs no other job, the launcher matters not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenreduce import __main__ as command
from tokenreduce.configuration import check_overrides, register_plugins, sweep_folder
from tokenreduce.evaluation import read_records
from tokenreduce.job import assigned_device
from tokenreduce.reporting.files import PAGE
from tokenreduce.sweep import Outcome, marks, outcomes_since, varied
from tokenreduce.testing import tiny_llava
from tokenreduce.testing.processors import tiny_processor

QUICK = (
    "benchmark.limit=6",
    "evaluation.random_seeds=1",
    "evaluation.timing_pairs=0",
    "evaluation.pictures=0",
    "tracking=none",
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_llava()
    model.save_pretrained(folder)
    tiny_processor(model, ["is", "there", "a", "red", "circle"]).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def records(output: Path | str) -> dict[str, list[dict[str, Any]]]:
    """All records below, by run, times aside."""
    folders = sorted(path.parent for path in Path(output).glob("*/records.jsonl"))
    return {folder.name: [{**vars(record), "seconds": None} for record in read_records(folder)] for folder in folders}


def outcomes(output: Path | str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(output).glob("sweep-*/jobs/*.json"))]


def sweep(*arguments: str) -> int:
    """The command in this process, without the report, which takes the longest; its exit status."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tokenreduce.command.write_report", lambda *_: None)
        return command.main(["-m", *arguments])


@pytest.fixture(scope="module")
def serial(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a sweep of two jobs, one after the other in this process."""
    output = tmp_path_factory.mktemp("serial") / "outputs"
    assert sweep("reducer=uniform", "reducer.keep=7,0.5", f"output={output}", *QUICK, f"model.path={checkpoint}") == 0
    return output


def test_a_sweep_is_one_row_a_job_and_a_report(
    checkpoint: Path, serial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in serial.rglob("*") if path.is_file() and "sweep" not in str(path)
    }
    arguments = ["reducer=uniform", "reducer.keep=7,0.5", *QUICK, f"model.path={checkpoint}", f"output={serial}"]
    assert command.main(["--multirun", *arguments]) == 0
    out, err = capsys.readouterr()
    rows = [line.split()[0] for line in out.splitlines() if " / 36" in line]
    assert rows == ["unreduced", "uniform", "uniform"]
    assert err.count("finished before") == 2 and err.count("loading") == 1, "the model is loaded once, and nothing done"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (page,) = serial.glob(f"sweep-*/report/{PAGE}")
    assert str(page) in out


def test_a_job_that_fails_costs_no_other_and_is_told(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reducer=uniform,pool", "reducer.keep=1.5,9", *QUICK, f"model.path={checkpoint}"]
    assert sweep(*arguments) == 2
    out, err = capsys.readouterr()
    assert out.count(" 9 / 36") == 2
    assert "failed    reducer=uniform reducer.keep=1.5: ValueError: keep=1.5 is not a ratio" in err
    assert "2 of 4 jobs failed" in err
    assert [outcome["error"] is None for outcome in outcomes("outputs")] == [False, True, False, True]


def test_a_bug_in_a_method_is_shown_in_full_and_costs_no_other_job(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenreduce_plugins.baselines import Pool

    def wrong(*_: Any) -> None:
        raise KeyError("not there")

    monkeypatch.setattr(Pool, "select", wrong)
    assert sweep("reducer=pool,uniform", *QUICK, f"model.path={checkpoint}") == 2
    out, err = capsys.readouterr()
    assert "Traceback" in err and "failed    reducer=pool: KeyError: 'not there'" in err
    assert [line.split()[0] for line in out.splitlines() if " / 36" in line] == ["unreduced", "uniform"]


def test_control_c_ends_the_whole_sweep(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenreduce.command.run_job", interrupted)
    assert sweep("reducer=pool,uniform", *QUICK, f"model.path={checkpoint}") == 130
    assert capsys.readouterr().err.count("job ") == 1


@pytest.mark.parametrize(
    "launcher", [["launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]]
)
def test_jobs_in_other_processes_leave_the_same_records(launcher: list[str], checkpoint: Path, serial: Path) -> None:
    keeps = "7,0.5" if "joblib" in launcher[0] else "7"
    assert sweep("reducer=uniform", f"reducer.keep={keeps}", *launcher, *QUICK, f"model.path={checkpoint}") == 0
    assert [outcome["error"] for outcome in outcomes("outputs")] == [None] * (keeps.count(",") + 1)
    found, expected = records("outputs"), records(serial)
    assert found == {name: expected[name] for name in found} and len(found) >= 3


def test_several_processes_leave_the_same_records_as_one(checkpoint: Path) -> None:
    arguments = ["reducer=uniform", "reducer.keep=7", "runtime.batch_size=2", *QUICK, f"model.path={checkpoint}"]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "tokenreduce", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("vs unreduced") == 1, "one process prints"
    assert "share 1 of 2: 4" in done.stderr, "the other has the other two samples"
    assert command.main([*arguments, "output=alone"]) == 0
    assert records("outputs") == records("alone")
    assert not list(Path("outputs").glob("*/records.part*"))


def test_several_processes_and_parallel_jobs_are_refused_together(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenreduce.evaluation import Processes

    monkeypatch.setattr("tokenreduce.command.launched", lambda: Processes(0, 2))
    assert command.main(["-m", "reducer=pool,uniform", "launcher=joblib", *QUICK]) == 2
    assert "use launcher=serial" in capsys.readouterr().err


def test_the_same_sweep_has_the_same_folder_wherever_and_however_it_runs() -> None:
    def folder(*arguments: str) -> str | None:
        overrides = [argument for argument in arguments if "=" in argument]
        found = sweep_folder(arguments, check_overrides(overrides))
        return None if found is None else found.name

    register_plugins()
    one = folder("-m", "reducer=pool,uniform", "benchmark.limit=3")
    assert one is not None and one == folder("--multirun", "benchmark.limit=3", "reducer=pool,uniform", "output=there")
    assert one == folder("-m", "reducer=pool,uniform", "benchmark.limit=3", "launcher=joblib", "tracking=none")
    assert one != folder("-m", "reducer=pool,uniform", "benchmark.limit=4")
    assert folder("reducer=pool") is None
    assert str(folder("experiment=budgets")).startswith("sweep-budgets-")


def test_outcomes_of_an_earlier_sweep_are_told_apart(tmp_path: Path) -> None:
    one, other = (Outcome(number, (f"keep={number}", "limit=3"), "run", None, 1.0) for number in range(2))
    one.write(tmp_path)
    before = marks(tmp_path)
    assert outcomes_since(tmp_path, before) == []
    other.write(tmp_path)
    assert outcomes_since(tmp_path, before) == [other]
    one.write(tmp_path)
    assert outcomes_since(tmp_path, before) == [one, other]
    assert varied([one, other]) == {0: "keep=0", 1: "keep=1"}


def test_jobs_take_the_gpus_of_a_machine_in_turn() -> None:
    assert [assigned_device("cuda", number, gpus=2) for number in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert {assigned_device("cuda", None, gpus=2), assigned_device("cuda", 3, gpus=0)} == {"cuda"}
    assert {assigned_device(device, 3, gpus=2) for device in ("cpu", "cuda:0")} == {"cpu", "cuda:0"}
