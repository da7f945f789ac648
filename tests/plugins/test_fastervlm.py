"""FasterVLM keeps what the official code keeps, on stored attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tokenreduce.signals import EncoderAttention
from tokenreduce_plugins.fastervlm import FasterVlm

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored


def kept(attention: Tensor, keep: int | float) -> list[int]:
    """The choice, given attention ``(heads, rows, 1 + patches)``, whose first row is the class token's."""
    reducer = FasterVlm(keep)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(attention, slice(1, None), class_token=0)
    patches = attention.shape[-1] - 1
    return show(reducer, step, torch.zeros(patches, 2), {EncoderAttention(-2): view}).index.tolist()


@pytest.mark.parametrize("case", cases("fastervlm"))
def test_official_vectors(case: Case) -> None:
    for sample, attention in enumerate(case.given["attn"]):
        assert kept(attention, case.settings["T"]) == case.expected["kept"][sample].tolist()
        received = stored(attention, slice(1, None), class_token=0).received()
        assert_equal_floats(received, case.expected["score"][sample])


@pytest.mark.parametrize("case", cases("fastervlm"))
def test_the_mean_of_all_rows_keeps_others(case: Case) -> None:
    mistaken = case.given["attn"].mean(dim=2, keepdim=True)
    assert any(
        kept(attention, case.settings["T"]) != case.expected["kept"][sample].tolist()
        for sample, attention in enumerate(mistaken)
    )


def test_worked_example() -> None:
    """The class token's own column, which would come first, is none of the tokens."""
    row = torch.tensor([0.55, 0.01, 0.09, 0.03, 0.02, 0.08, 0.04, 0.07, 0.05, 0.06])
    assert kept(row[None, None], 4) == [1, 4, 6, 8]


def test_heads_are_averaged() -> None:
    """The largest value of any head would keep 0, the first head alone 0 as well."""
    heads = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.1, 0.0, 0.4, 0.5]])
    assert kept(heads[:, None], 1) == [2]


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.25, 144), (0.1, 58), (0.05, 29), (1.0, 576), (0.0001, 1), (600, 576)]
)
def test_published_counts(keep: int | float, expected: int) -> None:
    assert len(kept(random(2, 1, 577).softmax(dim=-1), keep)) == expected


def test_without_a_class_token_attention_received_decides() -> None:
    geometry = replace(GEOMETRY, class_token=False)
    reducer, attention = FasterVlm(3), random(4, 9, 9).softmax(dim=-1)
    (step,) = reducer.steps(geometry)
    view = stored(attention, slice(0, None))
    selection = show(reducer, step, torch.zeros(9, 2), {EncoderAttention(-2): view}, geometry=geometry)
    assert selection.index.tolist() == sorted(attention.mean(dim=(0, 1)).topk(3).indices.tolist())
