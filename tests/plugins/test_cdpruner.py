"""CDPruner keeps what the official code keeps, given the likeness of tokens and question."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from transformers import LlavaForConditionalGeneration

from tokenreduce import reduce_tokens
from tokenreduce_plugins.cdpruner import CdPruner, QuestionLikeness, diverse, scaled

from .golden import GEOMETRY, Case, cases, random, show


@pytest.mark.parametrize("case", cases("cdpruner"))
def test_official_vectors(case: Case) -> None:
    images, text = (normalize(case.given[name], dim=-1) for name in ("image_embeds", "text_embeds"))
    likeness = images @ text.T
    relevance = scaled(-likeness.mean(dim=-1))  # over the whole batch, as the official code does
    count = case.expected["kept"].shape[1]
    for sample, features in enumerate(case.given["features"]):
        kept = case.expected["kept"][sample].tolist()
        assert sorted(diverse(normalize(features, dim=-1), relevance[sample], count).tolist()) == kept
        if len(images) == 1:
            reducer = CdPruner(count)
            (step,) = reducer.steps(GEOMETRY)
            selection = show(reducer, step, features, {QuestionLikeness(): likeness[sample]})
            assert selection.index.tolist() == kept


def worked(keep: int, sign: int = -1) -> list[int]:
    angles = torch.deg2rad(torch.tensor([0.0, 8, 30, 95, 110, 170, 205, 260, 311]))
    features = torch.stack([angles.cos(), angles.sin(), torch.full((9,), 0.5)], dim=1)
    likeness = torch.deg2rad(torch.tensor([10.0, 20, 30, 40, 50, 60, 70, 80, 85])).cos()[:, None]
    reducer = CdPruner(keep, sign=sign)
    (step,) = reducer.steps(GEOMETRY)
    return show(reducer, step, features, {QuestionLikeness(): likeness}).index.tolist()


def test_worked_example() -> None:
    likeness = torch.deg2rad(torch.tensor([10.0, 20, 30, 40, 50, 60, 70, 80, 85])).cos()
    expected = torch.tensor([0, 0.0503, 0.1323, 0.2437, 0.3810, 0.5401, 0.7161, 0.9036, 1.0])
    torch.testing.assert_close(scaled(-likeness), expected, atol=1e-4, rtol=0)
    assert [worked(1), worked(2), worked(3)] == [[8], [6, 8], [4, 6, 8]]


def test_the_sign_matters() -> None:
    assert worked(1, sign=1) == [0]


def test_more_tokens_than_the_kernel_has_dimensions() -> None:
    picked = diverse(normalize(random(30, 4), dim=-1), torch.ones(30), 20)
    assert len(picked.unique()) == 20


def test_relevance_that_tells_nothing_apart() -> None:
    assert scaled(torch.full((4,), 0.3)).tolist() == [1, 1, 1, 1]


def test_a_model_without_the_likeness_refuses_it(llava: LlavaForConditionalGeneration) -> None:
    with (
        pytest.raises(ValueError, match=r"CdPruner asks to see QuestionLikeness\(\), which Llava models cannot show"),
        reduce_tokens(llava, CdPruner(4)),
    ):
        pass
