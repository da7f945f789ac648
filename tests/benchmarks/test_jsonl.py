"""One's own images and questions, and what is said of mistakes in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

from tokenreduce.benchmarks.jsonl import JsonLines
from tokenreduce.registry import BENCHMARKS

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes lines beside three images, and gives the folder."""

    def write(*lines: Any) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        for name, color in (("red.png", "red"), ("blue.png", "blue"), ("grey.png", "grey")):
            Image.new("P" if name == "grey.png" else "RGB", (8, 6), color).save(tmp_path / "images" / name)
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "questions.jsonl").write_text(text + "\n", encoding="utf-8")
        return tmp_path

    return write


RED = {"image": "red.png", "question": "What color?", "answer": "red"}
BLUE = {"image": "blue.png", "question": "What color?", "answer": ["blue", "navy"], "category": "cold", "id": "b1"}


def test_a_line_is_a_question(folder: Folder) -> None:
    benchmark = JsonLines(path=str(folder(RED, BLUE)))
    assert len(benchmark) == 2
    red, blue = benchmark[0], benchmark[1]
    assert (red.id, red.question, red.answers, red.category) == ("1", "What color?", ("red",), "all")
    assert (blue.id, blue.answers, blue.category) == ("b1", ("blue", "navy"), "cold")
    assert red.image_id != blue.image_id
    assert benchmark.images(red)[0].getpixel((0, 0)) == (255, 0, 0)
    assert benchmark.score("Navy.", blue) == 1
    assert benchmark.score("red", blue) == 0
    assert benchmark.measures(["red", "blue"], [red, blue]) == {}


def test_columns_and_metric_are_chosen(folder: Folder) -> None:
    line = {"file": ["red.png", "grey.png"], "ask": "How far?", "truth": 2.5, "kind": "number", "no": 17}
    path = folder(line, {**line, "truth": 3, "no": 18})
    benchmark = BENCHMARKS.create(
        "jsonl",
        path=str(path / "questions.jsonl"),
        metric="relaxed",
        image_column="file",
        question_column="ask",
        answer_column="truth",
        category_column="kind",
        id_column="no",
    )
    sample = benchmark[0]
    assert (sample.id, sample.answers, sample.category) == ("17", ("2.5",), "number")
    assert [image.mode for image in benchmark.images(sample)] == ["RGB", "RGB"]
    assert benchmark.score("2.6", sample) == 1
    assert benchmark[1].answers == ("3",)


def test_choices_are_written_below_the_question(folder: Folder) -> None:
    lines = [{**RED, "choices": ["blue", "red"], "answer": answer} for answer in ("B", 1, "Red")]
    benchmark = JsonLines(path=str(folder(*lines)), metric="choice", choice_columns=("choices",))
    for sample in (benchmark[0], benchmark[1], benchmark[2]):
        assert sample.question == "What color?\nA. blue\nB. red"
        assert sample.answers == ("B", "red")
        assert benchmark.score("(B)", sample) == 1


def test_shuffling_is_seeded_and_keeps_prefixes_and_ids(folder: Folder) -> None:
    lines = [{**RED, "question": f"question {number}"} for number in range(20)]
    path = str(folder(*lines))
    plain, shuffled, again, other = (JsonLines(path=path, shuffle=seed) for seed in (None, 1, 1, 2))

    def ids(benchmark: JsonLines) -> list[str]:
        return [benchmark[place].id for place in range(20)]

    assert ids(shuffled) == ids(again) != ids(other)
    assert sorted(ids(shuffled), key=int) == ids(plain)
    assert shuffled[3].question == plain[int(shuffled[3].id) - 1].question


def test_a_sample_out_of_a_record_finds_its_image(folder: Folder) -> None:
    path = str(folder(RED, BLUE))
    sample = JsonLines(path=path)[1]
    assert JsonLines(path=path).images(sample)[0].getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match="there is no sample 'b2' in"):
        JsonLines(path=path).images(type(sample)("b2", "", (), "", ""))


def test_an_unreadable_image_is_the_samples_own_error(folder: Folder) -> None:
    path = folder(RED, {**RED, "image": "gone.png"}, {**RED, "image": "torn.png"})
    (path / "images" / "torn.png").write_bytes(b"no picture")
    benchmark = JsonLines(path=str(path))
    assert len(benchmark) == 3
    assert benchmark.images(benchmark[0])
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        benchmark.images(benchmark[1])
    with pytest.raises(UnidentifiedImageError, match=r"torn\.png"):
        benchmark.images(benchmark[2])


def test_the_content_is_what_a_run_is_known_by_and_not_its_place(folder: Folder, tmp_path: Path) -> None:
    before = JsonLines(path=str(folder(RED, BLUE)))
    digest = before.fingerprint()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    there = JsonLines(path=str(moved / "questions.jsonl"))
    assert (there.knobs(), there.fingerprint()) == (before.knobs(), digest)
    (moved / "images" / "blue.png").unlink()
    assert JsonLines(path=str(moved)).fingerprint() != digest


def test_a_picture_of_the_same_size_and_time_is_another_picture(folder: Folder) -> None:
    path = folder(RED, BLUE)
    picture = path / "images" / "blue.png"
    Image.new("RGB", (8, 6), "blue").save(picture, "BMP")
    digest = JsonLines(path=str(path)).fingerprint()
    content, status = picture.read_bytes(), picture.stat()
    Image.new("RGB", (8, 6), "navy").save(picture, "BMP")
    assert picture.stat().st_size == len(content)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert JsonLines(path=str(path)).fingerprint() != digest
    picture.write_bytes(content)
    assert JsonLines(path=str(path)).fingerprint() == digest


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([RED, "{'image': 1}"], r"questions\.jsonl, line 2, is not JSON .*: \"\{'image': 1\}\""),
        ([RED, "[1]"], r"line 2, is no object"),
        (
            [RED, {"image": "red.png", "questions": "?", "answer": "x"}],
            r"line 2, has no column 'question': did you mean 'questions'\?",
        ),
        ([{"image": "red.png", "question": "?"}], r"line 1, has no column 'answer'.*benchmark\.answer_column=NAME"),
        ([{**RED, "question": None}], "line 1,: the question None is no text"),
        ([{**RED, "answer": True}], "line 1,: the answer True is neither text nor a number"),
        ([{**RED, "answer": []}], r"line 1, has no answer, only \[\]; some data sets hide"),
        ([RED, {**RED, "answer": float("nan")}], "line 2,: the answer nan is no number that there is"),
        ([{**RED, "answer": [3, float("inf")]}], "line 1,: the answer inf is no number that there is"),
        (
            [{**RED, "answer": ["red", "."]}],
            r"line 1,: metric 'exact' cannot score sample '1': the answer '\.' is met by",
        ),
        ([RED, {**RED, "answer": "half \ud83d"}], r"line 2,: 'half .* holds half a character"),
        ([{**RED, "image": 7}], "line 1,: 7 is neither an image's file name nor a list of them"),
    ],
)
def test_a_mistake_is_told_with_its_line(folder: Folder, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        len(JsonLines(path=str(folder(*lines))))


CHOICES: dict[str, Any] = {"choice_columns": ("choices",)}


@pytest.mark.parametrize(
    ("metric", "fitting", "other", "reason", "settings"),
    [
        ("yes_no", "Yes", "cat", "the answer 'cat' is neither yes nor no", {}),
        ("yes_no", "no.", ["yes", "no"], "the answer is both yes and no", {}),
        ("mme", "No", "maybe", "the answer 'maybe' is neither yes nor no", {}),
        ("relaxed", "7%", "inf", "the answer 'inf' is no number that anything is near to", {}),
        ("anls", "a word", ["a word", " "], "the answer ' ' is met by saying nothing", {}),
        ("vqa", ["a", "b", "c", "d"], "red", "has 1 answers; metric 'vqa' is made for ten people's", {}),
        ("mmbench", "A", "B", "sample id 'second' is no number", CHOICES),
        ("yes_no", "yes", "no", "the answer 'A' is neither yes nor no", CHOICES),
    ],
)
def test_a_metric_refuses_what_it_cannot_score(
    folder: Folder, metric: str, fitting: Any, other: Any, reason: str, settings: dict[str, Any]
) -> None:
    lines = [
        {**RED, "answer": answer, "id": name, "choices": ["yes", "no"]}
        for answer, name in ((fitting, "1"), (other, "second"))
    ]
    if metric != "yes_no" or not settings:
        assert JsonLines(path=str(folder(lines[0])), metric=metric, **settings)[0]
    with pytest.raises(ValueError, match=rf"questions\.jsonl, line [12],.*{reason}"):
        len(JsonLines(path=str(folder(*lines)), metric=metric, **settings))


def test_a_metric_of_numbers_needs_one(folder: Folder) -> None:
    words, number = {**RED, "answer": "red"}, {**RED, "answer": "3.5"}
    assert len(JsonLines(path=str(folder(words, number)), metric="relaxed")) == 2
    with pytest.raises(ValueError, match=r"line 1, and all others have answers that are no numbers, which metric 'rel"):
        len(JsonLines(path=str(folder(words, words)), metric="relaxed"))


@pytest.mark.parametrize("metric", ["choice", "mmbench"])
def test_a_metric_of_choices_needs_them(folder: Folder, metric: str) -> None:
    with pytest.raises(ValueError, match=f"metric='{metric}' scores the letters of choices, and there are none: name"):
        JsonLines(path=str(folder(RED)), metric=metric)


def test_mistakes_in_settings_are_told(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        len(JsonLines(path=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"has to hold one \.jsonl file and holds none"):
        len(JsonLines(path=str(tmp_path)))
    path = str(folder(RED))
    with pytest.raises(ValueError, match="unknown metric 'exakt': did you mean 'exact'"):
        JsonLines(path=path, metric="exakt")
    with pytest.raises(ValueError, match="line 1, has 1 answers; metric 'vqa' is made for ten people's"):
        len(JsonLines(path=path, metric="vqa"))
    with pytest.raises(ValueError, match="choice_columns='choices' is not a list"):
        BENCHMARKS.create("jsonl", path=path, choice_columns="choices")
    with pytest.raises(ValueError, match="has no column 'kind'"):
        len(JsonLines(path=path, category_column="kind"))
    with pytest.raises(ValueError, match="shuffle=-1 is negative"):
        JsonLines(path=path, shuffle=-1)
    with pytest.raises(IndexError, match="sample 1 of 1"):
        JsonLines(path=path)[1]
