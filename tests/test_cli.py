"""The command as a user meets it: what it prints, what it leaves behind, and what it says to bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from tokenreduce import __main__ as command
from tokenreduce.evaluation import read_records, read_result, records
from tokenreduce.registry import REDUCERS
from tokenreduce.testing import tiny_llava
from tokenreduce.testing.processors import tiny_processor

TOKENS = 36
QUICK = (
    "benchmark.limit=6",
    "evaluation.random_seeds=1",
    "evaluation.timing_pairs=0",
    "evaluation.pictures=0",
    "tracking=none",
)


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of 36 visual tokens on disk, as anybody's checkpoint would be."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_llava()
    model.save_pretrained(folder)
    tiny_processor(model, ["is", "there", "a", "red", "circle"]).save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, in an empty directory, on the small checkpoint."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        own_model = any(argument.startswith("model") for argument in arguments)
        status = command.main([*arguments, *([] if own_model else [f"model.path={checkpoint}"])])
        return Outcome(status, *capsys.readouterr())

    return run


def finished_run(name: str) -> Path:
    (folder,) = (path.parent for path in Path("outputs").glob(f"{name}-*/metrics.json"))
    return folder


def test_a_run_prints_a_table_and_leaves_metrics_records_configuration_and_a_picture(run: Run) -> None:
    outcome = run(
        "reducer.keep=0.5",
        "benchmark.limit=6",
        "evaluation.random_seeds=2",
        "evaluation.timing_pairs=2",
        "tracking=none",
    )
    assert outcome.status == 0, outcome.err
    lines = [" ".join(line.split()) for line in outcome.out.splitlines() if line.strip()]
    rows = {line.split()[0]: line for line in reversed(lines)}  # the first of each name: the table of results
    assert "36 / 36" in rows["unreduced"]
    assert "18 / 36" in rows["fopru_row"]
    assert "18 / 36" in rows["random"]
    assert "MiB" in rows["fopru_row"] or sys.platform != "linux"
    assert "\x1b" not in outcome.out + outcome.err  # plain, for this is no terminal
    assert "Traceback" not in outcome.err

    folder = finished_run("fopru_row")
    assert str(folder / "metrics.json") in outcome.out
    assert read_result(folder).main.visual_tokens.kept == 18
    assert len(read_records(folder)) == 6
    assert "keep: 0.5" in (folder / "config.yaml").read_text()
    with Image.open(folder / "figures" / "kept_tokens.png") as picture:
        assert picture.width > 500
    assert [path.name for path in Path().iterdir()] == ["outputs"]  # Hydra leaves nothing behind


def test_a_finished_run_is_not_done_again(run: Run) -> None:
    run(*QUICK)
    before = {path: path.read_bytes() for path in Path("outputs").glob("*/records.jsonl")}
    assert len(before) == 3
    again = run(*QUICK)
    assert again.status == 0
    assert again.err.count("6 from an earlier run") == 3
    assert {path: path.read_bytes() for path in Path("outputs").glob("*/records.jsonl")} == before


@pytest.mark.parametrize("reducer", REDUCERS.names())
def test_every_reducer_runs(reducer: str, run: Run, clip: Path) -> None:
    required = {
        "chain": ["reducer.reducers=[{name: pool, keep: 0.5}, {name: uniform, keep: 4}]"],
        "cmai": ["reducer.threshold=0.01", "reducer.layer=2"],
        "efficientvla": ["reducer.alpha=0.5", "reducer.layer=0.5"],
        "vmtc": ["reducer.clusters=0.25", "reducer.layer=-2", "reducer.iterations=10"],
    }.get(reducer, [])
    if any(field.name == "clip" for field in dataclasses.fields(REDUCERS.get(reducer))):
        required = [f"reducer.clip={clip}"]
    outcome = run(f"reducer={reducer}", *required, *QUICK)
    assert outcome.status == 0, outcome.err
    benchmark = read_result(finished_run(reducer)).benchmark
    assert benchmark.errors == 0
    assert benchmark.samples == 6


def test_the_shipped_checkpoint_is_the_default(run: Run) -> None:
    outcome = run("model=tiny", *QUICK)
    assert outcome.status == 0, outcome.err
    assert "36 / 144" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reducer=fopru_ro"], "unknown reducer 'fopru_ro': did you mean 'fopru_row'?"),
        (["benchmark=scene"], "unknown benchmark 'scene': did you mean 'scenes'?"),
        (["model=lava"], "unknown model 'lava': did you mean 'llava'?"),
        (["reducer.kep=0.5"], "has no knob 'kep': did you mean 'keep'?"),
        (["++reducer.kep=0.5"], "has no knob 'kep': did you mean 'keep'?"),
        (["reducer.keep=0"], "keep=0 is not a number of visual tokens: it must be at least 1"),
        (["reducer.keep=-3"], "keep=-3 is not a number of visual tokens: it must be at least 1"),
        (["reducer.keep=-0.5"], "keep=-0.5 is not a ratio of the visual tokens: it must be above 0 and at most 1.0"),
        (["reducer.keep=1.5"], "keep=1.5 is not a ratio of the visual tokens: it must be above 0 and at most 1.0"),
        (["reducer.keep=half"], "keep='half' is not"),
        (["reducer=random", "reducer.keep=37"], "keep=37 is more than the 36 visual tokens there are"),
        (["reducer.positions=sideways"], "positions='sideways' is not one of 'original', 'compact'"),
        (["benchmark.limit=0"], "limit=0 is not a whole number above 0"),
        (["benchmark.prompt=hello"], "has no {question} in it"),
        (["evaluation.timing_pairs=-1"], "timing_pairs=-1 is negative"),
        (["model.path=/nowhere/at/all"], "model.path='/nowhere/at/all' is no directory"),
        (["model.path=."], "model.path='.' holds no checkpoint"),
        (["runtime.dtype=int4"], "unknown dtype 'int4': known: float32"),
        (["runtime.device=abacus"], "unknown device 'abacus': known: cpu"),
        (["runtime.attention=slow"], "slow"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_a_few_clear_lines(arguments: list[str], message: str, run: Run) -> None:
    outcome = run(*arguments, *(each for each in QUICK if each.split("=")[0] not in str(arguments)))
    assert outcome.status == 2
    assert message in outcome.err
    errors = outcome.err[outcome.err.index("error: ") :]
    assert len(errors.splitlines()) <= 3
    assert "Traceback" not in outcome.err
    assert not list(Path().glob("outputs/*/records.jsonl"))  # it fails before any work is done


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told(run: Run) -> None:
    outcome = run("runtime=cuda", *QUICK)
    assert (outcome.status, "runtime=cpu always works" in outcome.err) == (2, True)


def test_a_checkpoint_of_another_class_is_refused_with_the_supported_ones(run: Run, tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    outcome = run(f"model.path={tmp_path / 'llama'}", *QUICK)
    assert outcome.status == 2
    assert "holds LlamaForCausalLM, which is not supported" in outcome.err
    assert "Supported: Gemma3ForConditionalGeneration" in outcome.err


def test_a_hub_that_cannot_be_reached_is_two_lines_that_name_the_way_out(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tokenreduce.models.loading.HfApi.model_info", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = run("model=llava", *QUICK)
    assert outcome.status == 2
    first, second = outcome.err[outcome.err.index("error: ") :].splitlines()
    assert "'llava-hf/llava-1.5-7b-hf' is not on this machine, and the Hugging Face hub cannot be reached" in first
    assert "model.path=DIRECTORY" in second


def test_an_output_that_cannot_be_a_directory_is_refused(run: Run) -> None:
    Path("taken").write_text("a file")
    for output in ("taken", "taken/below", "/proc/nowhere"):
        outcome = run(f"output={output}", *QUICK)
        assert outcome.status == 2
        assert outcome.err.startswith("error: ")
        assert output.split("/below")[0] in outcome.err
        assert "Traceback" not in outcome.err


def test_an_output_without_permission_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser's directories are all writable
    outcome = run("output=locked", *QUICK)
    assert (outcome.status, "output='locked' cannot be written to" in outcome.err) == (2, True)


def test_a_full_disk_ends_the_run_clearly_and_keeps_what_was_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(FileIO):
        room = 4

        def write(self, content: Any) -> int:
            FullDisk.room -= 1
            if FullDisk.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    with monkeypatch.context() as patched:
        patched.setattr(records, "FileIO", FullDisk)
        outcome = run(*QUICK)
    assert outcome.status == 2
    assert "No space left on device" in outcome.err
    assert "records.jsonl" in outcome.err
    assert "Traceback" not in outcome.err
    again = run(*QUICK)
    assert again.status == 0
    assert "unreduced: 6, 4 from an earlier run" in again.err


def test_hydras_switch_still_shows_where_an_error_came_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="is not a ratio"):
        run("reducer.keep=1.5", *QUICK)
    with pytest.raises(ValueError, match="unknown reducer"):
        run("reducer=fopru_ro", *QUICK)


def test_a_sweep_goes_on_after_a_job_that_fails(run: Run) -> None:
    outcome = run("-m", "reducer=random", "reducer.keep=7,1.5,9", *QUICK)
    assert outcome.status == 2
    assert outcome.err.count("error: ") == 1
    assert "7 / 36" in outcome.out
    assert "9 / 36" in outcome.out


def test_a_broken_tracker_costs_a_warning_and_no_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = run(*QUICK[:-1])
    assert outcome.status == 0
    assert outcome.err.count("warning: this run is not logged to Weights & Biases") == 1
    assert (finished_run("fopru_row") / "metrics.json").exists()


def test_help_lists_what_can_be_chosen(run: Run) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    assert "fopru_row_144" in outcome.out
    assert "uniform" in outcome.out
    assert "reducer.keep=0.25" in outcome.out


def test_an_interrupted_command_says_that_it_can_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", interrupted)
    outcome = run(*QUICK)
    assert outcome.status == 130
    assert outcome.err.splitlines()[-1] == "interrupted: the same command continues where this one stopped"


def test_a_warning_is_one_line(run: Run) -> None:
    outcome = run("runtime.threads=1", *QUICK)
    assert not [line for line in outcome.err.splitlines() if "UserWarning" in line]


@pytest.fixture
def third_party(tmp_path: Path) -> Path:
    """Where a package of somebody else's is installed: a reducer, a broken one, and a benchmark with a bad image."""
    folder = tmp_path / "site"
    information = folder / "others-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        textwrap.dedent(
            """\
            [tokenreduce.reducers]
            first_tokens = others:FirstTokens
            wrecked = others_wrecked:Wrecked
            [tokenreduce.benchmarks]
            cards = others:Cards
            """
        )
    )
    (folder / "others_wrecked.py").write_text("import a_package_that_is_not_there\n")
    (folder / "others.py").write_text(
        textwrap.dedent(
            '''\
            from dataclasses import dataclass

            import torch
            from PIL import Image

            from tokenreduce.benchmarks.benchmark import Benchmark, Sample
            from tokenreduce.reducer import AtProjector, ScoreReducer


            @dataclass(frozen=True)
            class FirstTokens(ScoreReducer):
                """Keep the first tokens."""

                first: int

                def steps(self, geometry):
                    return [AtProjector(keep=self.first)]

                def score(self, tokens):
                    return -torch.arange(len(tokens)).float()


            @dataclass(frozen=True)
            class Cards(Benchmark):
                """Plain cards, the third of which is damaged."""

                def __len__(self):
                    return 5

                def __getitem__(self, index):
                    return Sample(f"card-{index}", "is there a red circle", ("yes",), "cards", f"image-{index}")

                def images(self, sample):
                    if sample.id == "card-2":
                        raise OSError("image file is truncated")
                    return [Image.new("RGB", (60, 48), (9, 9, 50 * int(sample.id[-1])))]
            '''
        )
    )
    return folder


def heed_interrupts() -> None:
    """A background job is born deaf to control-C, and so are its children; a user's command is not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tokenreduce", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def test_somebody_elses_package_works_and_a_broken_part_of_it_is_one_warning(
    third_party: Path, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = [f"model.path={checkpoint}", "reducer=first_tokens", "reducer.first=5", "benchmark=cards"]
    process = start(
        [*arguments, "evaluation.timing_pairs=2", "evaluation.random_seeds=1", "tracking=none"],
        tmp_path,
        PYTHONPATH=str(third_party),
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (warning,) = (line for line in err.splitlines() if "wrecked" in line)
    assert warning.startswith("warning: reducer 'wrecked' of others is skipped: ModuleNotFoundError")
    assert "5 / 36" in out
    assert "left out: 1 samples without an answer, first card-2: image cannot be read" in out
    (folder,) = (tmp_path / "outputs").glob("first_tokens-*")
    errors = {record.id: record.error for record in read_records(folder)}
    assert "truncated" in str(errors.pop("card-2"))
    assert set(errors.values()) == {None}


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_control_c_ends_cleanly_and_the_same_command_goes_on(
    checkpoint: Path, run: Run, sent: signal.Signals, status: int
) -> None:
    arguments = [
        f"model.path={checkpoint}",
        "runtime.batch_size=2",
        *("evaluation.random_seeds=0", "evaluation.timing_pairs=0", "evaluation.pictures=0", "tracking=none"),
    ]
    process = start(["benchmark.limit=1000", *arguments], Path())
    written = 0
    for _ in range(1200):
        written = sum(len(path.read_bytes().splitlines()) for path in Path().glob("outputs/none-*/records.jsonl"))
        if written >= 4 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.splitlines()[-1] == "interrupted: the same command continues where this one stopped"
    assert "Traceback" not in err
    (log,) = Path().glob("outputs/none-*/records.jsonl")
    lines = log.read_text().splitlines()
    assert len(lines) >= written >= 4
    assert all(json.loads(line)["error"] is None for line in lines)

    again = run("benchmark.limit=6", *arguments)
    assert again.status == 0, again.err
    assert "from an earlier run" in again.err
    assert log.read_text().splitlines()[: len(lines)] == lines
