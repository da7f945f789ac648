"""AdaFV takes, of all splits between salient and relevant tokens, the one whose tokens hold most of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlavaForConditionalGeneration

from tokenreduce import reduce_tokens
from tokenreduce.testing import prompts
from tokenreduce.testing.processors import tiny_processor
from tokenreduce_plugins.adafv import AdaFv, mixed, shares

from .golden import GEOMETRY, random, show, stored

SALIENCE = torch.tensor([0.30, 0.02, 0.20, 0.05, 0.03, 0.10, 0.05, 0.15, 0.10])
RELEVANCE = torch.tensor([0.02, 0.30, 0.05, 0.25, 0.03, 0.05, 0.20, 0.05, 0.05])


def test_worked_example() -> None:
    """Two of each: .5945. Salient ones alone hold .3571, relevant ones .506, and one or three salient ones less too."""
    best = mixed(SALIENCE, RELEVANCE, 4)
    assert best.nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert float((best @ SALIENCE.double()) * (best @ RELEVANCE.double())) ** 0.5 == pytest.approx(0.5945, abs=1e-4)


def literal(salience: Tensor, relevance: Tensor, count: int) -> list[int]:
    """Every split in turn, by sorting lists."""
    ranks = [
        sorted(range(len(each)), key=lambda token: -each[token]) for each in (salience.tolist(), relevance.tolist())
    ]
    found: list[tuple[float, list[int]]] = []
    for first in range(count + 1):
        kept = ranks[0][:first]
        kept = kept + [token for token in ranks[1] if token not in kept][: count - first]
        found.append((float(salience[kept].sum() * relevance[kept].sum()), sorted(kept)))
    return max(found, key=lambda each: each[0])[1]


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12])
def test_every_split_is_tried(count: int) -> None:
    for seed in range(20):
        salience, relevance = (random(12, seed=2 * seed + own).double().softmax(-1) for own in (0, 1))
        assert mixed(salience, relevance, count).nonzero()[:, 0].tolist() == literal(salience, relevance, count)


def test_of_equal_splits_that_with_fewer_salient_tokens_is_taken() -> None:
    assert mixed(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.5, 0.2]), 1).tolist() == [0, 1, 0]


def test_likenesses_become_as_concentrated_as_salience() -> None:
    likeness = random(30).tanh()
    for scale in (0.1, 1.0, 5.0):
        salience = (scale * random(30, seed=1)).softmax(-1)
        entropy = torch.special.entr(shares(likeness, salience)).sum()
        torch.testing.assert_close(entropy, torch.special.entr(salience).sum(), atol=1e-4, rtol=0)
    assert shares(torch.zeros(4), torch.tensor([0.7, 0.1, 0.1, 0.1])).tolist() == [0.25] * 4, "nothing to concentrate"


def kept(words: Tensor, **knobs: Any) -> list[int]:
    """Of nine tokens, whose class token attends to them by ``SALIENCE``."""
    reducer = AdaFv(**{"keep": 4, **knobs})
    (step,) = reducer.steps(GEOMETRY)
    probabilities = torch.cat([torch.zeros(1), SALIENCE]).expand(2, 10, 10)
    attention = stored(probabilities, slice(1, 10), class_token=0)
    signals = dict(zip(step.sees, (attention, words), strict=True))
    return show(reducer, step, torch.eye(9), {**signals}).index.tolist()


def test_settings() -> None:
    words = torch.stack([torch.eye(9)[1], 0.5 * torch.eye(9)[3] - torch.eye(9)[1]])
    cosines = normalize(words, dim=-1)
    for name, likeness in (("max", cosines.amax(0)), ("mean", cosines.mean(0))):
        expected = literal(SALIENCE, (likeness / 0.05).softmax(-1), 4)
        assert kept(words, aggregate=name, temperature=0.05) == expected
        assert kept(words, aggregate=name) == literal(SALIENCE, shares(likeness, SALIENCE), 4)
    assert kept(words, aggregate="max", temperature=0.05) != kept(words, aggregate="mean", temperature=0.05)
    assert kept(words[:0]) == [0, 2, 5, 7], "without words the salient tokens stay"
    assert kept(words, keep=1.0) == [*range(9)]


def test_one_pool_for_all_pictures_of_a_prompt(llava: LlavaForConditionalGeneration) -> None:
    questions = "colour square", "many there"
    processor = tiny_processor(llava, [word for question in questions for word in question.split()])

    def left(question: str) -> list[list[int]]:
        with reduce_tokens(llava, "adafv", keep=9, question=question, processor=processor) as attachment:
            llava(**prompts(llava, [2, 1]))
        return [[len(image.kept) for image in sample.images] for sample in attachment.samples]

    (first, second), (alone,) = left(questions[0])
    assert first + second == alone == 9
    assert first != second
