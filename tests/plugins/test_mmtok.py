"""MMTok keeps what the official code keeps, and reads the words of the question that a picture can show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import cover
from tokenreduce.testing import prompts
from tokenreduce.testing.processors import tiny_processor
from tokenreduce_plugins.mmtok import UNSEEN, MmTok, QuestionWords, cleaned

from .golden import GEOMETRY, Case, assert_equal_floats, cases, show


def of(case: Case) -> MmTok:
    settings = case.settings
    return MmTok(settings["k"], alpha=settings["alpha"], tv_temp=settings["tv_temp"], vv_temp=settings["vv_temp"])


def excluded(case: Case) -> Tensor:
    """Which tokens lie in padding ``(n,)`` bool."""
    padding = torch.zeros(len(case.given["x"]), dtype=torch.bool)
    return padding.index_fill(0, case.given.get("padding", torch.empty(0, dtype=torch.long)), True)


def kept(reducer: MmTok, features: Tensor, states: Tensor, words: Tensor, padding: Tensor | None = None) -> list[int]:
    (step,) = reducer.steps(GEOMETRY)
    padding = torch.zeros(len(features), dtype=torch.bool) if padding is None else padding
    signals = dict(zip(step.sees, (states, words, padding), strict=True))
    return show(reducer, step, features, {**signals}).index.tolist()


def picked(reducer: MmTok, case: Case) -> list[int]:
    """The order of picking."""
    rows = reducer.coverage(case.given["x"], case.given["x_clip"], case.given["text"])
    return cover(rows, case.settings["k"], gains=-9.0 * excluded(case)).tolist()


@pytest.mark.parametrize("case", cases("mmtok"))
def test_official_vectors(case: Case) -> None:
    given, reducer = case.given, of(case)
    index = kept(reducer, given["x"], given["x_clip"], given["text"], excluded(case))
    assert index == case.expected["kept"].tolist()
    assert given["x"][index].equal(case.expected["features"])
    assert picked(reducer, case) == case.expected["pick_order"].tolist()


@pytest.mark.parametrize("case", cases("mmtok"))
def test_mistakes_are_noticed(case: Case) -> None:
    """Other temperatures, tokens compared as projected, padding that may be kept, and softmaxes along the words. The
    weight of the picture is noticed where words are shared by many tokens."""
    reducer, given, expected = of(case), case.given, case.expected["pick_order"].tolist()
    assert picked(replace(reducer, vv_temp=2 * reducer.vv_temp), case) != expected
    assert picked(reducer, replace(case, given={**given, "x_clip": given["x"]})) != expected
    if case.settings["padding"]:
        assert picked(reducer, replace(case, given={**given, "padding": given["padding"][:0]})) != expected
    if case.settings["tv_temp"] >= 0.1:
        assert picked(replace(reducer, alpha=1.0), case) != expected
        assert picked(replace(reducer, tv_temp=0.02), case) != expected
    rows, words = reducer.coverage(given["x"], given["x_clip"], given["text"]), len(given["text"])
    assert_equal_floats(rows[:words].sum(1), torch.full((words,), 1 / words))
    assert_equal_floats(rows[words:].sum(1), torch.full((len(given["x"]),), reducer.alpha / len(given["x"])))


ANGLES = torch.tensor([0.0, 8, 30, 95, 110, 170, 205, 260, 311]).deg2rad()
WORKED = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
WORDS = torch.tensor([[1, 0], [-0.5, 0.9]])


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, {1: [4], 3: [0, 4, 6], 5: [0, 4, 6, 7, 8], 9: [*range(9)], 20: [*range(9)]}),
        ({"alpha": 0.0}, {3: [0, 1, 4], 5: [0, 1, 2, 3, 4]}),
    ],
    ids=["both", "words alone"],
)
def test_worked_example(knobs: dict[str, Any], expected: dict[int, list[int]]) -> None:
    for keep, index in expected.items():
        assert kept(MmTok(keep, **knobs), WORKED, WORKED, WORDS) == index


def test_padding_comes_last_and_no_words_do_no_harm() -> None:
    places = torch.arange(9)
    assert kept(MmTok(8), WORKED, WORKED, WORDS, places == 4) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert kept(MmTok(3), WORKED, WORKED, WORDS, places >= 0) == kept(MmTok(3), WORKED, WORKED, WORDS)
    assert len(kept(MmTok(3), WORKED, WORKED, WORDS[:0])) == 3


def test_words_that_no_picture_shows_are_left_out() -> None:
    instruction = "Answer the question using a single word or phrase."
    assert len(UNSEEN) == 47
    assert cleaned(f"What colour is THE cat's hat?\n{instruction}") == ["colour", "cat", "s", "hat"]
    assert cleaned("Who are you?") == ["Who", "are", "you?"], "where nothing is left"


def test_every_word_is_read_alone(llava: LlavaForConditionalGeneration) -> None:
    question, table = "what colour is the square ?", llava.get_input_embeddings()
    processor = tiny_processor(llava, [*question.split(), "Question:"])
    seen: list[Tensor] = []

    class Sees(MmTok):
        def coverage(self, features: Tensor, states: Tensor, words: Tensor) -> Tensor:
            seen.append(words)
            return super().coverage(features, states, words)

    for clean in (True, False):
        with reduce_tokens(llava, Sees(clean_text=clean), question=question, processor=processor), torch.no_grad():
            llava(**prompts(llava))
    for words, found in zip((["colour", "square"], ["Question:", *question.split()]), seen, strict=True):
        assert found.equal(table(torch.tensor(processor.tokenizer.convert_tokens_to_ids(words))))
    assert QuestionWords(True) != QuestionWords(False)


def test_the_padding_of_a_square_is_not_kept(llava: LlavaForConditionalGeneration) -> None:
    """Two rows of 6 x 6 tokens above and one and a half below, and a grey patch amid the picture."""
    inputs = prompts(llava)
    side = inputs["pixel_values"].shape[-1] // 6
    pixels = torch.randn(1, 3, 6 * side, 6 * side, generator=torch.Generator().manual_seed(0))
    pixels[:, :, : 2 * side] = -0.0113  # 122 of 255 where the mean is 122.77
    pixels[:, :, 6 * side - side * 3 // 2 :] = 0.0
    pixels[:, :, 2 * side : 3 * side, :side] = 0.0
    reducer = create("mmtok", keep=18)
    processor = tiny_processor(llava, ["what"])
    with reduce_tokens(llava, reducer, question="what", processor=processor) as attachment, torch.no_grad():
        llava(**{**inputs, "pixel_values": pixels})
    (sample,) = attachment.samples
    assert list(sample.images[0].kept) == [*range(12, 30)]


def test_the_question_decides(llava: LlavaForConditionalGeneration) -> None:
    questions = "colour square", "many there"
    processor = tiny_processor(llava, [word for question in questions for word in question.split()])

    def found(question: str) -> list[tuple[int, ...]]:
        with reduce_tokens(llava, "mmtok", keep=6, question=question, processor=processor) as attachment:
            llava(**prompts(llava, [2, 1]))
        return [tuple(image.kept) for sample in attachment.samples for image in sample.images]

    first, second = map(found, questions)
    assert {len(each) for each in first} == {6}
    assert first != second
