"""EfficientVLA's selection is what the paper's text says, written out in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce import create
from tokenreduce_plugins.efficientvla import EfficientVla

from .golden import GEOMETRY, random, show, stored


def kept(reducer: EfficientVla, features: Tensor, attention: Tensor) -> list[int]:
    """What is kept where ``attention`` (heads, text, tokens) is paid by the text behind the visual tokens."""
    heads, text, count = attention.shape
    rows = torch.zeros(heads, count + text, count)
    rows[:, count:] = attention
    view = stored(rows, slice(0, count), text=torch.arange(count, count + text))
    step = reducer.steps(GEOMETRY)[0]
    return show(reducer, step, features, {step.sees[0]: view}).index.tolist()


def test_worked_example() -> None:
    relevance = torch.tensor([0.9, 0.2, 0.6, 0.5, 0.1, 0.4])
    cosines = torch.tensor([1, 0.0, 0.5, 0.8, -0.995, 0.1])
    features = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    for text in (1, 3):  # the sum over text tokens, not any one's
        attention = (relevance / text).expand(2, text, 6)
        assert kept(EfficientVla(keep=4, key=1, alpha=0.5, layer=2), features, attention) == [0, 1, 2, 4]


def test_distance_is_to_the_key_tokens_alone() -> None:
    features = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0.1, 1, 0]])
    attention = torch.tensor([[[0.5, 0.3, 0.1, 0.1, 0.05]]])
    # Token 1 is taken for its relevance, and what is like it may be taken none the less; so may two that are alike.
    assert kept(EfficientVla(keep=4, key=1, alpha=0.34, layer=2), features, attention) == [0, 1, 2, 3]
    assert kept(EfficientVla(keep=4, key=2, alpha=0, layer=2), features, attention) == [0, 1, 2, 3]


def written_out(features: Tensor, attention: Tensor, keep: int, key: int, alpha: float) -> list[int]:
    """The paper's selection, token by token."""
    count = len(features)
    relevance = [float(attention[:, :, token].mean(dim=0).sum()) for token in range(count)]
    low, high = min(relevance), max(relevance)
    scores = [(each - low) / (high - low) for each in relevance]
    order = sorted(range(count), key=lambda token: (-scores[token], token))
    keys = order[:key]
    chosen = order[: key + math.floor(alpha * (keep - key))]

    def distance(token: int) -> float:
        vectors = [[float(value) for value in features[each]] for each in (token, *keys)]
        own, *others = [[value / math.hypot(*vector) for value in vector] for vector in vectors]
        return 1 - max(sum(a * b for a, b in zip(own, other, strict=True)) for other in others)

    rest = sorted(set(range(count)) - set(chosen), key=lambda token: (-distance(token), token))
    return sorted([*chosen, *rest[: keep - len(chosen)]])


@pytest.mark.parametrize(("keep", "key", "alpha"), [(12, 4, 0.5), (13, 8, 0.5), (9, 4, 0.0), (9, 4, 1.0), (20, 5, 0.3)])
def test_it_is_the_papers_text(keep: int, key: int, alpha: float) -> None:
    features, attention = random(40, 6), random(3, 7, 40, seed=1).softmax(dim=-1)
    reducer = EfficientVla(keep=keep, key=key, alpha=alpha, layer=2)
    assert kept(reducer, features, attention) == written_out(features, attention, keep, key, alpha)


def test_few_tokens_are_key_tokens() -> None:
    attention = torch.tensor([[[0.1, 0.5, 0.2, 0.2]]])
    assert kept(EfficientVla(keep=2, key=4, alpha=0.5, layer=2), random(4, 3), attention) == [1, 2]


def test_without_text_behind_the_last_token_asks() -> None:
    rows = random(1, 5, 5).softmax(dim=-1)
    reducer = EfficientVla(keep=1, alpha=0.5, layer=2)
    step = reducer.steps(GEOMETRY)[0]
    view = stored(rows, slice(0, 5), text=torch.arange(5, 5))
    assert show(reducer, step, random(5, 3), {step.sees[0]: view}).index.tolist() == [int(rows[0, -1].argmax())]


def test_the_default_is_the_papers_share() -> None:
    assert EfficientVla(alpha=0.5, layer=2).keep * 256 == 56
    assert [create(f"efficientvla_{keep}").keep for keep in (56, 112)] == [56, 112]  # type: ignore[attr-defined]


@pytest.mark.parametrize("knobs", [{"key": 0}, {"alpha": 1.5}])
def test_settings_that_cannot_be_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}={next(iter(knobs.values()))}"):
        EfficientVla(**{"alpha": 0.5, "layer": 2, **knobs})
