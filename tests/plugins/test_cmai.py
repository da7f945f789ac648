"""CMAI hides what its text says, written out in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenreduce_plugins.cmai import Cmai

from .golden import GEOMETRY, random, show, stored


def sight(rows: Tensor, visual: slice, text: slice, threshold: float) -> Tensor:
    """Who may attend to whom by attention ``(heads, sequence, sequence)``."""
    reducer = Cmai(threshold=threshold, layer=2)
    step = reducer.steps(GEOMETRY)[0]
    places = torch.arange(rows.shape[1])
    view = stored(rows, visual, text=places[text], keys=torch.empty(1, len(places), 1))
    selection = show(reducer, step, torch.zeros(len(places[visual]), 3), {step.sees[0]: view})
    assert selection.index.tolist() == list(range(len(places[visual])))  # all stay
    assert selection.sight is not None
    return selection.sight


def test_worked_example() -> None:
    rows = torch.zeros(1, 5, 5)
    rows[0, 2:, 2:] = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    rows[0, 2:, :2] = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    hidden = sight(rows, slice(0, 2), slice(2, 5), threshold=0.45)
    assert hidden.dtype == torch.int8
    assert (hidden < 0).nonzero().tolist() == [[2, 1], [3, 0], [4, 0]]
    assert not (hidden > 0).any()


@pytest.mark.parametrize("threshold", [0.005, 0.02, 1.0])
def test_focus_is_what_the_words_that_a_word_reads_look_at(threshold: float) -> None:
    heads, before, visual, text = 3, 4, 9, 6
    length = before + visual + text
    logits = random(heads, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    rows = logits.softmax(dim=-1)
    found = sight(rows, slice(before, before + visual), slice(before + visual, length), threshold)
    expected = torch.zeros(length, length, dtype=torch.int8)
    for word in range(before + visual, length):
        for token in range(before, before + visual):
            focus = 0.0
            for read in range(before + visual, word + 1):
                attended, looked = (
                    sum(float(rows[head, one, other]) for head in range(heads)) / heads
                    for one, other in ((word, read), (read, token))
                )
                focus += attended * looked
            expected[word, token] = -int(focus < threshold)
    assert found.equal(expected)
    assert 0 < -int(found.sum()) <= visual * text
