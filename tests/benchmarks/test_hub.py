"""The public benchmarks' presets, on a few rows of the very schemas that their data sets have on the hub."""

from __future__ import annotations

import io
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from hydra import compose, initialize_config_module
from PIL import Image

from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.benchmarks.hub import HubDataset
from tokenreduce.configuration import CONFIG_MODULE, CONFIG_NAME, knobs_of, register_plugins
from tokenreduce.evaluation.prompts import PLACE
from tokenreduce.registry import BENCHMARKS
from tokenreduce.testing.benchmarks import images_are_what_clusters_them, samples_are_distinct, samples_repeat

TEXT, TEXTS, NUMBER = Value("string"), datasets.List(Value("string")), Value("int64")
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(shade: int) -> bytes:
    """A picture's file, all of one shade."""
    file = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


def shade(image: Image.Image) -> int:
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return int(value[0])


def image(number: int) -> dict[str, Any]:
    return {"bytes": picture(number), "path": None}


def rows(features: dict[str, Any], *values: dict[str, Any]) -> Dataset:
    """Rows of a schema; what a row does not say is empty."""
    table = {name: [row.get(name, _empty(feature)) for row in values] for name, feature in features.items()}
    return Dataset.from_dict(table, Features(features))


def _empty(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _empty(each) for name, each in feature.items()}
    return [] if isinstance(feature, datasets.List) else "" if feature == TEXT else None


def texts(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, TEXT)


IMAGE = datasets.Image()
POPE = rows(
    texts("id", "question_id", "question", "answer", "image_source") | {"image": IMAGE} | texts("category"),
    {
        "question": "Is there a dog?",
        "answer": "yes",
        "image_source": "310196",
        "image": image(1),
        "category": "adversarial",
    },
    {
        "question": "Is there a cat?",
        "answer": "no",
        "image_source": "310196",
        "image": image(1),
        "category": "adversarial",
    },
    {
        "question": "Is there a cow?",
        "answer": "yes",
        "image_source": "210789",
        "image": image(2),
        "category": "popular",
    },
)
GQA_QUESTIONS = rows(
    texts("id", "imageId", "question", "answer", "fullAnswer", "semanticStr")
    | {"isBalanced": Value("bool"), "types": texts("structural", "semantic", "detailed")},
    {"id": "201", "imageId": "n161313", "question": "Is it overcast?", "answer": "no"},
    {"id": "202", "imageId": "n235859", "question": "Who is wearing the dress?", "answer": "woman"},
)
GQA_IMAGES = rows(
    texts("id") | {"image": IMAGE}, {"id": "n235859", "image": image(3)}, {"id": "n161313", "image": image(4)}
)
PEOPLE = ["nous les gosses", "dakota", "clos culombu", *["dakota digital"] * 5, "dakota", "dakota"]
TEXTVQA = rows(
    {"image_id": TEXT, "question_id": Value("int32"), "question": TEXT, "question_tokens": TEXTS, "image": IMAGE}
    | {"image_width": Value("int32"), "image_height": Value("int32"), "flickr_original_url": TEXT}
    | {"flickr_300k_url": TEXT, "answers": TEXTS, "image_classes": TEXTS, "set_name": TEXT, "ocr_tokens": TEXTS},
    {"image_id": "a3", "question_id": 34602, "question": "what brand?", "answers": PEOPLE, "image": image(5)},
    {"image_id": "a3", "question_id": 34603, "question": "which city?", "answers": ["lyon"] * 10, "image": image(5)},
)
MME = rows(
    {"question_id": TEXT, "image": IMAGE} | texts("question", "answer", "category"),
    *(
        {"question_id": name, "image": image(shade), "question": f"{text} Please answer yes or no.", "answer": answer}
        | {"category": name.split("/")[0]}
        for name, shade, text, answer in (
            ("code_reasoning/0020.png", 6, "Is a c++ code shown?", "Yes"),
            ("code_reasoning/0020.png", 6, "Is a python code shown?", "No"),
            ("count/0001.png", 7, "Are there two dogs?", "No"),
            ("count/0001.png", 7, "Is there one dog?", "Yes"),
        )
    ),
)
MMBENCH = rows(
    {"index": NUMBER}
    | texts("question", "hint", "A", "B", "C", "D", "answer", "category")
    | {"image": IMAGE}
    | texts("source", "l2-category", "comment", "split"),
    {"index": 241, "question": "What is it?", "hint": "A photo.", "A": "cat", "B": "dog", "C": "cow", "D": "nan"}
    | {"answer": "B", "image": image(8), "l2-category": "finegrained_perception"},
    {"index": 252, "question": "Which is true?", "hint": "nan", "A": "one", "B": "two", "C": "nan", "D": "nan"}
    | {"answer": "A", "image": image(9), "l2-category": "logic_reasoning"},
    {"index": 1000241, "question": "What is it?", "hint": "A photo.", "A": "dog", "B": "cow", "C": "cat", "D": "nan"}
    | {"answer": "A", "image": image(8), "l2-category": "finegrained_perception"},
)
SCIENCEQA = rows(
    {"image": IMAGE, "question": TEXT, "choices": TEXTS, "answer": Value("int8"), "hint": TEXT}
    | texts("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"),
    {"image": image(10), "question": "Which is farthest north?", "choices": ["Maine", "Ohio"], "answer": 0}
    | {"subject": "social science"},
    {"image": image(11), "question": "Which ocean?", "choices": ["Pacific", "Arctic", "Indian"], "answer": 2}
    | {"subject": "natural science", "hint": "Look."},
)
CHARTQA = rows(
    texts("type", "question", "answer") | {"image": IMAGE},
    {"type": "human_test", "question": "How many items are shown?", "answer": "14", "image": image(12)},
    {"type": "augmented_test", "question": "What is the value of lamb?", "answer": "103.7", "image": image(12)},
)
DOCVQA = rows(
    {"questionId": TEXT, "question": TEXT, "question_types": TEXTS, "image": IMAGE, "docId": NUMBER}
    | texts("ucsf_document_id", "ucsf_document_page_no")
    | {"answers": TEXTS, "data_split": TEXT},
    {"questionId": "49153", "question": "What is the value?", "image": image(13), "docId": 1, "answers": ["0.28"]},
    {"questionId": "24580", "question": "Which university?", "image": image(14), "docId": 2}
    | {"answers": ["university of california", "UC"]},
)
FILES: dict[str, dict[str, Dataset]] = {
    "pope": {"data/test": POPE},
    "gqa": {
        "testdev_balanced_instructions/testdev": GQA_QUESTIONS,
        "testdev_balanced_images/testdev": GQA_IMAGES,
    },
    "textvqa": {"data/validation": TEXTVQA},
    "mme": {"data/test": MME},
    "mmbench": {"data/dev": MMBENCH},
    "scienceqa": {"ScienceQA-IMG/test": SCIENCEQA},
    "chartqa": {"data/test": CHARTQA},
    "docvqa": {"DocVQA/validation": DOCVQA},
}
"""Where each data set's files are on the hub, and rows like theirs."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data sets on disk, laid out and described as on the hub."""
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        datasets.disable_progress_bars()
        for name, files in FILES.items():
            configs, sizes = [], []
            for place, table in files.items():
                (root / name / place).parent.mkdir(parents=True, exist_ok=True)
                table.to_parquet(root / name / f"{place}-00000-of-00001.parquet")
                subset, split = place.split("/")
                config = "default" if subset == "data" else subset
                configs.append(f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {place}-*\n")
                size = f"    num_bytes: {table.data.nbytes}\n    num_examples: {len(table)}\n"
                sizes.append(f"- config_name: {config}\n  splits:\n  - name: {split}\n{size}")
            card = "---\nconfigs:\n" + "".join(configs) + "dataset_info:\n" + "".join(sizes) + "---\n"
            (root / name / "README.md").write_text(card, encoding="utf-8")
        yield root
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def presets(hub: Path) -> dict[str, tuple[HubDataset, str]]:
    """Every preset, pointed at the files, with its prompt."""
    register_plugins()
    found = {}
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        for name in FILES:
            node = compose(CONFIG_NAME, [f"benchmark={name}", f"benchmark.path={hub / name}"]).benchmark
            benchmark = BENCHMARKS.create(node.name, **knobs_of(node, "benchmark"))
            assert isinstance(benchmark, HubDataset)
            found[name] = benchmark, str(node.prompt)
    return found


def samples(benchmark: HubDataset) -> list[Sample]:
    return [benchmark[place] for place in range(len(benchmark))]


Presets = dict[str, tuple[HubDataset, str]]


@pytest.mark.parametrize("name", FILES)
def test_a_preset_reads_its_data_set_and_accepts_its_answers(presets: Presets, name: str) -> None:
    benchmark, prompt = presets[name]
    found = samples(benchmark)
    assert len(found) == len(next(iter(FILES[name].values())))
    assert benchmark.title().split()[0] == name
    assert prompt.startswith(PLACE) and prompt.removeprefix(PLACE) in (SHORT, LETTER)
    samples_are_distinct(benchmark, 20)
    samples_repeat(benchmark, 20)
    images_are_what_clusters_them(benchmark, 20)
    for sample in found:
        assert benchmark.images(sample)[0].size == (12, 10)
        best = max(sample.answers, key=sample.answers.count)
        assert benchmark.score(best, sample) > 0.5
        assert benchmark.score("elephant", sample) in (0, benchmark.score("", sample))


def test_the_readme_names_every_preset_its_data_and_its_size() -> None:
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert {file.stem for file in (root / "conf" / "benchmark").glob("*.yaml")} == set(FILES)
    for name in FILES:
        preset = (root / "conf" / "benchmark" / f"{name}.yaml").read_text(encoding="utf-8")
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        (path,) = re.findall(r"^path: (.*)$", preset, re.MULTILINE)
        assert f"[{path}](https://huggingface.co/datasets/{path})" in row
        assert row.split("|")[2].split()[-1] in preset  # how many questions


def test_pope(presets: Presets) -> None:
    benchmark, _ = presets["pope"]
    found = samples(benchmark)
    assert [sample.category for sample in found] == ["adversarial", "adversarial", "popular"]
    assert [sample.image_id[-6:] for sample in found] == ["310196", "310196", "210789"]
    assert benchmark.measures(["Yes.", "Yes", "No"], found) == {"F1": 50, "precision": 50, "recall": 50, "yes": 200 / 3}


def test_gqas_images_stand_apart(presets: Presets) -> None:
    benchmark, _ = presets["gqa"]
    assert [shade(benchmark.images(sample)[0]) for sample in samples(benchmark)] == [4, 3]
    missing = replace(benchmark, image_id_column="id")
    with pytest.raises(ValueError, match=r"testdev_balanced_images of .* has no image '201'"):
        missing.images(missing[0])


def test_textvqa_gives_half_a_point_for_half_an_agreement(presets: Presets) -> None:
    benchmark, _ = presets["textvqa"]
    first = benchmark[0]
    assert len(first.answers) == 10
    assert benchmark.score("Dakota digital", first) == 1
    assert benchmark.score("dakota", first) == pytest.approx(0.9)
    assert benchmark.score("nous les gosses", first) == pytest.approx(0.3)


def test_mme_scores_pairs(presets: Presets) -> None:
    benchmark, _ = presets["mme"]
    found = samples(benchmark)
    assert found[0].question == "Is a c++ code shown?"
    assert benchmark.measures(["Yes", "No", "No", "No"], found) == {"perception": 50, "cognition": 200}


def test_mmbench_writes_hint_and_choices_and_scores_circles(presets: Presets) -> None:
    benchmark, _ = presets["mmbench"]
    found = samples(benchmark)
    assert found[0].question == "A photo.\nWhat is it?\nA. cat\nB. dog\nC. cow"
    assert found[1].question == "Which is true?\nA. one\nB. two"
    assert found[1].category == "logic_reasoning"
    assert found[0].image_id == found[2].image_id != found[1].image_id
    assert benchmark.measures(["B", "A", "A"], found) == {"circular": 100}
    assert benchmark.measures(["B", "A", "B"], found) == {"circular": 50}


def test_scienceqas_answer_is_a_place(presets: Presets) -> None:
    benchmark, _ = presets["scienceqa"]
    assert [sample.answers for sample in samples(benchmark)] == [("A", "Maine"), ("C", "Indian")]
    assert benchmark[1].question == "Context: Look.\nWhich ocean?\nA. Pacific\nB. Arctic\nC. Indian"


def test_charts_and_documents(presets: Presets) -> None:
    charts, _ = presets["chartqa"]
    assert charts.score("108", charts[1]) == 1
    assert charts[0].image_id == charts[1].image_id  # the same picture, though no column says so
    documents, _ = presets["docvqa"]
    assert documents.score("University of Californa", documents[1]) == pytest.approx(1 - 1 / 24)


@pytest.mark.parametrize("name", FILES)
def test_streaming_gives_the_same_samples(presets: Presets, name: str) -> None:
    whole, _ = presets[name]
    stream = replace(whole, streaming=True)
    assert stream[1] == whole[1]
    assert samples(stream) == samples(whole)
    assert [shade(stream.images(sample)[0]) for sample in samples(stream)] == [
        shade(whole.images(sample)[0]) for sample in samples(whole)
    ]
    assert (stream.knobs(), stream.fingerprint()) == (whole.knobs(), whole.fingerprint())


def test_streaming_reads_no_further_than_it_is_asked(presets: Presets, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    decode = datasets.IterableDataset.decode

    def counted(rows: datasets.IterableDataset, enable: bool) -> Iterator[Any]:
        for number, row in enumerate(decode(rows, enable)):
            read.append(number)
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "decode", counted)
    stream = replace(presets["pope"][0], streaming=True)
    assert len(stream) == 3
    assert stream[0].answers == ("yes",)
    assert read == [0]


def test_a_sample_out_of_a_record_finds_its_image(presets: Presets) -> None:
    for name, (benchmark, _) in presets.items():
        sample = samples(benchmark)[1]
        again = replace(benchmark)
        assert shade(again.images(sample)[0]) == shade(benchmark.images(sample)[0]), name


def test_settings_are_sent_to_another_process_and_rows_are_not(presets: Presets) -> None:
    stream = replace(presets["pope"][0], streaming=True)
    assert stream[0]
    assert len(sent := pickle.dumps(stream)) < 2000
    assert pickle.loads(sent) == stream
    assert pickle.loads(sent)[0] == stream[0]


def test_no_other_split_is_fetched(hub: Path) -> None:
    folder = hub / "splits" / "data"
    folder.mkdir(parents=True)
    CHARTQA.to_parquet(folder / "test-00000-of-00001.parquet")
    (folder / "train-00000-of-00001.parquet").write_bytes(b"opening this would fail")
    assert len(HubDataset(path=str(folder.parent))) == 2


def test_shuffling_is_seeded(presets: Presets) -> None:
    benchmark, _ = presets["mme"]
    orders = [[sample.id for sample in samples(replace(benchmark, shuffle=seed))] for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) > 1
    assert all(sorted(order) == ["0", "1", "2", "3"] for order in orders)


def test_a_data_set_is_known_by_its_content_and_not_by_its_place(presets: Presets, hub: Path) -> None:
    benchmark, _ = presets["chartqa"]
    here, moved = (benchmark.fingerprint(), benchmark.knobs()), hub / "elsewhere"
    (hub / "chartqa").rename(moved)
    try:
        there = replace(benchmark, path=str(moved))
        assert (there.fingerprint(), there.knobs()) == here
        assert "path" not in there.knobs()
    finally:
        moved.rename(hub / "chartqa")
    assert presets["pope"][0].fingerprint() != benchmark.fingerprint()


def test_images_that_rows_name_are_known_by_their_content(hub: Path) -> None:
    folder = hub / "named"
    folder.mkdir()
    file = folder / "one.png"
    file.write_bytes(picture(1))
    lines = {"question": ["?"], "answer": ["x"], "image": [str(file)]}
    Dataset.from_dict(lines).to_csv(folder / "test.csv")
    benchmark = HubDataset(path=str(folder))
    digest = benchmark.fingerprint()
    assert shade(benchmark.images(benchmark[0])[0]) == 1
    assert replace(benchmark, streaming=True).fingerprint() == digest
    file.write_bytes(picture(2))
    assert benchmark.fingerprint() != digest


def test_several_images_and_damaged_ones(hub: Path) -> None:
    features = {"q": TEXT, "a": TEXT, "pictures": datasets.List(datasets.Image())}
    torn = {"bytes": picture(3)[:40], "path": None}
    folder = hub / "several"
    folder.mkdir()
    pictures: list[list[dict[str, Any]]] = [[image(1), image(2)], [torn], []]
    table = rows(features, *({"q": "?", "a": "x", "pictures": each} for each in pictures))
    table.to_parquet(folder / "test.parquet")
    benchmark = HubDataset(path=str(folder), question_column="q", answer_column="a", image_column="pictures")
    assert [shade(each) for each in benchmark.images(benchmark[0])] == [1, 2]
    with pytest.raises(OSError, match=r"truncated|cannot identify"):
        benchmark.images(benchmark[1])
    assert benchmark.images(benchmark[2]) == []


def test_mistakes_are_told(presets: Presets, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pope, _ = presets["pope"]
    with pytest.raises(ValueError, match=r"row 0 of .*pope test has no column 'questio': did you mean 'question'\?"):
        replace(pope, question_column="questio")[0]
    with pytest.raises(ValueError, match=r"pope has no split 'tests': did you mean 'test'\?"):
        len(replace(pope, split="tests"))
    with pytest.raises(ValueError, match="'nope' not found"):
        len(replace(pope, subset="nope"))
    with pytest.raises(FileNotFoundError):
        len(replace(pope, path=str(hub / "nowhere")))
    with pytest.raises(ValueError, match="'social science' is no choice; it is one of A, B, a place from 0 to 1"):
        replace(presets["scienceqa"][0], answer_column="subject", choice_columns=("choices",))[0]
    with pytest.raises(ValueError, match="shuffle=1 needs the whole split"):
        replace(pope, shuffle=1, streaming=True)
    with pytest.raises(ValueError, match="needs image_id_column"):
        replace(pope, images_subset="images", image_id_column=None)
    with pytest.raises(ValueError, match=r"row 0 of .*chartqa test and all others have answers that are no numbers"):
        len(replace(presets["chartqa"][0], answer_column="question"))
    with pytest.raises(ValueError, match=r"row 2 of .*: metric 'yes_no' cannot score sample '2': the answer 'popular'"):
        replace(pope, answer_column="category")[2]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'tokenreduce\[datasets\]'"):
        len(replace(pope))
