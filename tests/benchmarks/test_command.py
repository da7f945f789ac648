"""Images of one's own, as somebody runs them: the whole command, on a small checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from tokenreduce import __main__ as command
from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.benchmarks.scoring import mme_measures
from tokenreduce.evaluation import read_records, read_result
from tokenreduce.testing import tiny_llava
from tokenreduce.testing.processors import tiny_processor

QUICK = ("evaluation.random_seeds=1", "evaluation.timing_pairs=0", "evaluation.pictures=0", "tracking=none")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_llava()
    model.save_pretrained(folder)
    tiny_processor(model, ["is", "it", "red", "yes", "no"]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for number, color in enumerate(["red", "blue", "green"] * 2):
        Image.new("RGB", (40, 40), color).save(tmp_path / "mine" / "images" / f"{number}.png")
        answer = "yes" if color == "red" else "no"
        lines.append({"image": f"{number}.png", "question": "is it red", "answer": answer, "category": color})
    lines.append({"image": "lost.png", "question": "is it red", "answer": "no"})
    (tmp_path / "mine" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path / "mine"


def test_a_folder_is_compared_like_any_benchmark(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    arguments = [
        "benchmark=jsonl",
        "benchmark.path=mine",
        "benchmark.metric=yes_no",
        f"model.path={checkpoint}",
        *QUICK,
    ]
    assert command.main([*arguments, "reducer=pool", "reducer.keep=4"]) == 0
    printed = capsys.readouterr().out
    (run,) = Path("outputs").glob("pool-*")
    result = read_result(run)
    assert result.benchmark.categories == {"red": 2, "blue": 2, "green": 2}
    assert result.benchmark.name == "mine"
    assert result.benchmark.errors == 1
    assert "No such file" in result.benchmark.failed[0].error
    assert list(result.main.measures) == ["F1", "precision", "recall", "yes"]
    assert "F1" in printed and "1 samples without an answer" in printed
    assert [record.id for record in read_records(run)] == [str(number) for number in range(1, 8)]


def test_a_run_goes_on_without_questions_that_cannot_be_asked(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    lines[1] = lines[0].replace("is it red", "is it \\ud83d red")
    lines[3] = lines[3].replace("is it red", "is <image> red")
    (folder / "questions.jsonl").write_text("\n".join(lines[:6]), encoding="utf-8")
    arguments = ["benchmark=jsonl", "benchmark.path=mine", f"model.path={checkpoint}", *QUICK]
    assert command.main([*arguments, "reducer=pool", "reducer.keep=4"]) == 0
    assert "2 samples without an answer" in capsys.readouterr().out
    (run,) = Path("outputs").glob("pool-*")
    errors = {record.id: record.error or "" for record in read_records(run)}
    assert [name for name, error in errors.items() if error] == ["2", "4"]
    assert r"questions.jsonl, line 2,: the question 'is it \\ud83d red' holds half a character" in errors["2"]
    assert "sample '4': the question 'is <image> red' holds '<image>'" in errors["4"]


def test_a_public_benchmarks_preset_runs_on_a_local_copy(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "cache")
    names = [name for name in ("count/0.png", "count/1.png", "OCR/2.png") for _ in range(2)]
    columns = {
        "question_id": names,
        "image": [str(folder / "images" / name.split("/")[1]) for name in names],
        "question": ["is it red Please answer yes or no."] * 6,
        "answer": ["Yes", "No"] * 3,
        "category": [name.split("/")[0] for name in names],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    Path("MME").mkdir()
    table.to_parquet("MME/test-00000-of-00001.parquet")
    arguments = ["benchmark=mme", "benchmark.path=MME", f"model.path={checkpoint}", *QUICK, "reducer=pool"]
    assert command.main([*arguments, "reducer.keep=4", "benchmark.limit=4", "benchmark.streaming=true"]) == 0
    assert command.main([*arguments, "reducer.keep=4"]) == 0  # the same run goes on
    assert "perception" in capsys.readouterr().out
    (run,) = Path("outputs").glob("pool-*")
    result, records = read_result(run), read_records(run)
    samples = [Sample(each.id, each.question, each.expected, each.category, each.image_id) for each in records]
    measured = result.main.measures["perception"].value
    assert measured == mme_measures([record.answer or "" for record in records], samples)["perception"]
    assert result.benchmark.name == "MME test"
    assert [record.question for record in records] == ["is it red"] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark=jsonl"], "benchmark 'jsonl' needs a value for 'path': add benchmark.path=VALUE"),
        (["benchmark=jsonl", "benchmark.path=nowhere"], "'nowhere': there is no such file or folder"),
        (
            ["benchmark=jsonl", "benchmark.path=mine", "benchmark.metric=vqua"],
            "unknown metric 'vqua': did you mean 'vqa'?",
        ),
        (["benchmark=jsonl", "benchmark.path=mine", "benchmark.question_column=text"], "has no column 'text'"),
        (["benchmark=jsonl", "benchmark.path=mine", "benchmark.metric=choice"], "metric='choice' scores the letters"),
        (["benchmark=jsonl", "benchmark.path=mine", "benchmark.metric=relaxed"], "metric 'relaxed' is for: take"),
        (
            ["benchmark=jsonl", "benchmark.path=mine", "benchmark.metric=yes_no", "benchmark.answer_column=category"],
            "line 1,: metric 'yes_no' cannot score sample '1': the answer 'red' is neither yes nor no",
        ),
        (
            ["benchmark=hf", "benchmark.path=table", "benchmark.metric=mme", "benchmark.limit=3"],
            "row 2 of table test: metric 'mme' cannot score sample '2': the answer 'maybe' is neither yes nor no",
        ),
        (["benchmark=hf", "benchmark.path=mine/images", "benchmark.split=dev"], "dev"),
        (["benchmark=pop"], "unknown benchmark 'pop': did you mean 'pope'?"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "cache")
    Path("table").mkdir()
    pictures = {"image": [str(folder / "images" / "0.png")] * 3, "question": ["is it red"] * 3}
    datasets.Dataset.from_dict({**pictures, "answer": ["yes", "No.", "maybe"]}).to_csv("table/test.csv")
    monkeypatch.setattr("tokenreduce.job.load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert command.main([*arguments, *QUICK]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
