"""The loop: one record a sample, whatever a sample does; what is there is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenreduce import create
from tokenreduce.attach import ImageReduction, SampleReduction, StepReduction
from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.evaluation import Record, Silent, StorageError, evaluate, read_records
from tokenreduce.evaluation.backend import Answer, Backend
from tokenreduce.evaluation.costs import Cost
from tokenreduce.evaluation.prompts import Prompt, Prompts
from tokenreduce.evaluation.runner import Runner
from tokenreduce.evaluation.transformers_backend import TransformersBackend
from tokenreduce.reducer import Grid, TokenReducer

Evaluate = Callable[..., list[Record]]


class Watched(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, int, int]] = []
        self.advanced = 0
        self.finished = 0
        self.notes: list[str] = []

    def start(self, phase: str, total: int, done: int = 0) -> None:
        self.starts.append((phase, total, done))

    def advance(self, count: int = 1) -> None:
        self.advanced += count

    def finish(self) -> None:
        self.finished += 1

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def run(model: Any, processor: Any, cards: Any, tmp_path: Path) -> Evaluate:
    def run(
        reducer: str = "random", benchmark: Any = None, folder: Path = tmp_path / "run", **settings: Any
    ) -> list[Record]:
        settings = {"batch_size": 4, "max_new_tokens": 3, **settings}
        return evaluate(model, processor, benchmark or cards(count=10), create(reducer), folder=folder, **settings)

    return run


def timeless(records: list[Record]) -> list[Record]:
    return [replace(record, seconds=None) for record in records]


def test_every_sample_has_a_record_with_all_that_a_report_needs(run: Evaluate, tmp_path: Path) -> None:
    progress = Watched()
    records = run(progress=progress)
    assert [record.id for record in records] == [f"card-{number}" for number in range(10)]
    assert records == read_records(tmp_path / "run")
    assert (progress.starts, progress.advanced, progress.finished) == ([("samples", 10, 0)], 10, 1)
    for record in records:
        assert record.answer and record.score is not None and record.error is None
        assert record.visual_tokens == 36 and record.entering == record.layer_mean == 9
        assert len(set(record.lengths)) == 1 and len(record.lengths) == 4
        (image,) = record.images
        (step,) = image.steps
        assert image.grid == Grid(6, 6) and step.site == "projector" and len(step.index) == 9
        assert [step.source[token] for token in step.index] == list(range(9)) and step.source.count(-1) == 27
        assert record.llm_flops and record.vision_flops and record.kv_bytes and record.seconds


def test_answers_are_those_of_the_model_alone(run: Evaluate, model: Any, processor: Any, cards: Any) -> None:
    benchmark = cards(count=3)
    for reducer in ("none", "random"):
        for record, place in zip(
            run(reducer, benchmark, batch_size=1, folder=Path(f"{reducer}")), range(3), strict=True
        ):
            text = processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": benchmark[place].question}],
                    }
                ],
                add_generation_prompt=True,
            )
            inputs = processor(text=text, images=benchmark.images(benchmark[place]), return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert (record.answer == processor.decode(tokens, skip_special_tokens=True)) == (reducer == "none")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_finished_run_asks_the_model_nothing(run: Evaluate, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    records = run()
    monkeypatch.setattr(model, "generate", None)
    progress = Watched()
    assert run(progress=progress) == records
    assert (progress.starts, progress.advanced) == ([("samples", 10, 10)], 0)


def test_a_limit_is_a_prefix_and_can_be_raised(run: Evaluate, tmp_path: Path) -> None:
    whole = run(folder=tmp_path / "whole")
    for limit in (3, 4, 5, 10):
        part = run(limit=limit)
        assert timeless(part) == timeless(whole[:limit]), "a cut batch still has its neighbours"
        assert len(read_records(tmp_path / "run")) == limit
    assert run(limit=2) == read_records(tmp_path / "run")[:2]
    assert len(run(limit=99)) == 10


def test_an_unreadable_image_is_a_record_with_its_error(run: Evaluate, cards: Any) -> None:
    records = run(benchmark=cards(count=10, broken=(1,)))
    broken, fine = records[3:6], records[:3] + records[6:]
    assert {record.error for record in broken} == {"image cannot be read: OSError: image file image-1.png is truncated"}
    assert all(record.answer is None and record.score is None and record.entering is None for record in broken)
    assert all(record.error is None and record.answer for record in fine)


def test_images_that_are_all_unreadable_are_records_too(run: Evaluate, cards: Any) -> None:
    assert all(record.error for record in run(benchmark=cards(count=10, broken=(0, 1, 2, 3))))


def test_a_damaged_file_that_opens_is_noticed(processor: Any, cards: Any, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "damaged.png"
    cards().images(cards()[0])[0].save(path)
    path.write_bytes(path.read_bytes()[:-1500])

    class Files(cards):
        def images(self, sample: Sample) -> list[Image.Image]:
            return [Image.open(path)]

    files = Files()
    assert isinstance(Prompts(files).unreadable(files[0]), OSError)


def test_one_bad_sample_does_not_harm_its_batch(
    run: Evaluate, model: Any, monkeypatch: pytest.MonkeyPatch, cards: Any
) -> None:
    class Picky(cards):
        def score(self, answer: str, sample: Sample) -> float:
            if sample.id == "card-1":
                raise ZeroDivisionError("no such answer")
            return 1.0

    records = run(benchmark=Picky(count=10))
    assert [record.error for record in records if record.error] == ["ZeroDivisionError: no such answer"]
    assert sum(record.score or 0 for record in records) == 9


def test_a_run_that_cannot_work_ends_at_once_and_leaves_no_records(
    run: Evaluate, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(**kwargs: Any) -> None:
        calls.append(kwargs)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("none")
    assert len(calls) < 12 and read_records(tmp_path / "run") == []
    monkeypatch.undo()
    assert all(record.error is None for record in run("none"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), RuntimeError("CUDA out of memory. Tried")], ids=str
)
def test_out_of_memory_halves_the_batch_and_says_so(
    error: Exception, run: Evaluate, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    generate = model.generate

    def narrow(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise error
        return generate(**inputs)

    calm = run("none", batch_size=7, folder=tmp_path / "calm")
    monkeypatch.setattr(model, "generate", narrow)
    progress = Watched()
    records = run("none", batch_size=7, progress=progress)
    assert sizes == [7, 3, 3, 1, 3], "found out once; the last batch is ragged"
    assert progress.notes == ["out of memory with 7 samples at once: going on with 3"]
    assert [record.answer for record in records] == [record.answer for record in calm]


def test_more_tokens_than_there_are_is_the_reducers_own_error(
    model: Any, processor: Any, cards: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="keep=99 is more than the 36 visual tokens"):
        evaluate(model, processor, cards(count=10), create("random", keep=99), folder=tmp_path)


def test_an_interrupt_keeps_what_was_answered(run: Evaluate, tmp_path: Path) -> None:
    class Impatient(Watched):
        def advance(self, count: int = 1) -> None:
            super().advance(count)
            if self.advanced == 8:
                raise KeyboardInterrupt

    progress = Impatient()
    with pytest.raises(KeyboardInterrupt):
        run(progress=progress)
    assert progress.finished == 1 and len(read_records(tmp_path / "run")) == 8
    assert timeless(run()) == timeless(run(folder=tmp_path / "calm"))


def test_different_samples_may_have_different_reducers(model: Any, processor: Any, cards: Any, tmp_path: Path) -> None:
    counts = {f"card-{number}": (0, 4, 9, 36)[number % 4] for number in range(8)}

    def reducer_for(sample: str) -> Any:
        return create("random", keep=counts[sample]) if counts[sample] else create("no_image")

    records = evaluate(model, processor, cards(count=8), reducer_for, folder=tmp_path, batch_size=8, max_new_tokens=2)
    assert {record.id: record.entering for record in records} == counts


def test_an_output_that_is_no_folder_is_named(run: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/run.*another output folder"):
        run(folder=tmp_path / "file" / "run")


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"limit": 0}, {"max_new_tokens": -1}, {"limit": 1.5}])
def test_a_count_that_is_none_is_named(run: Evaluate, setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value} is not a whole number above 0"):
        run(**setting)


def test_a_prompt_without_the_question_is_refused(run: Evaluate) -> None:
    with pytest.raises(ValueError, match=r"prompt='Answer!' has no \{question\} in it"):
        run(prompt="Answer!")


def test_ids_must_be_unique(run: Evaluate, cards: Any) -> None:
    class Twice(cards):
        def __getitem__(self, index: int) -> Sample:
            return replace(super().__getitem__(index), id=f"card-{index // 2}")

    with pytest.raises(ValueError, match="2 samples have the id 'card-0'"):
        run(benchmark=Twice(count=10))


def test_the_question_stands_in_the_template_as_it_is(model: Any, processor: Any, cards: Any) -> None:
    class Braces(cards):
        def __getitem__(self, index: int) -> Sample:
            return replace(super().__getitem__(index), question="picture {0} {question} top")

    benchmark = Braces(count=2)
    prompt = Prompts(benchmark, "what is {question} left").prompt(benchmark[0])
    (text,) = processor.batch_decode(TransformersBackend(model, processor).inputs([prompt])["input_ids"])
    assert "what is picture <unk> <unk> top left ASSISTANT:" in " ".join(text.split())


def test_inputs_are_made_once_and_padded_on_the_left(model: Any, processor: Any, cards: Any) -> None:
    prompts, backend = Prompts(cards(count=6)), TransformersBackend(model, processor)
    asked = [prompts.prompt(sample) for sample in prompts.samples(0, 6)]
    inputs = backend.inputs(asked)
    assert all(again is inputs[name] for name, again in backend.inputs(asked).items())
    backend.forget()
    again = backend.inputs(asked)
    assert all(again[name] is not inputs[name] and torch.equal(again[name], inputs[name]) for name in inputs)
    assert (inputs["attention_mask"][:, -1] == 1).all() and (inputs["attention_mask"][:, 0] == 0).any()


class Parrot:
    """A back end without a model: it says the question's last word, and keeps every second token."""

    image_tokens = ()

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.forgotten = False

    def answer(
        self, prompts: Sequence[Prompt], reducer: TokenReducer, max_new_tokens: int, *, share_vision: bool = False
    ) -> list[Answer]:
        self.batches.append([prompt.id for prompt in prompts])
        if "card-4" in self.batches[-1]:
            raise RuntimeError("no parrot likes card 4")
        step = StepReduction("projector", (0, 2), (0, -1, 1, -1))
        reduction = SampleReduction(
            (ImageReduction(Grid(2, 2), (step,), 5),), visual_tokens=4, entering=2, lengths=(7,)
        )
        cost = Cost(entering=2, layer_mean=2.0, vision_flops=5.0, llm_flops=3.0, kv_bytes=64)
        assert [image.size for image in prompts[0].images()] == [(48, 48)]
        return [Answer(prompt.text.split()[-2], reduction, cost, 0.5) for prompt in prompts]

    def forget(self) -> None:
        self.forgotten = True


def test_the_loop_takes_any_back_end(cards: Any, tmp_path: Path) -> None:
    backend: Backend = Parrot()
    runner = Runner(backend, cards(count=6), batch_size=4, prompt="say: {question}")
    runner.rehearse(create("uniform"))
    records = runner.run(create("uniform"), tmp_path)
    assert isinstance(backend, Parrot)
    assert backend.batches[0] == ["card-0"], "the rehearsal"
    assert backend.batches[1:3] == [["card-0", "card-1", "card-2", "card-3"], ["card-4", "card-5"]]
    assert records == read_records(tmp_path)
    assert [record.answer for record in records] == ["is", "in", "the", "picture", None, "is"]
    assert [record.error for record in records] == [None] * 4 + ["RuntimeError: no parrot likes card 4", None]
    assert records[0].images[0].kept == (0, 2)
    assert (records[0].entering, records[0].lengths, records[0].llm_flops) == (2, (7,), 3.0)
    runner.forget()
    assert backend.forgotten
