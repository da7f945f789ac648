"""A chain is its reducers, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration as Model

from tokenreduce import create, reduce_tokens
from tokenreduce.evaluation.costs import prefill_cost
from tokenreduce.evaluation.identity import reducer_identity
from tokenreduce.testing import check_reducer, prompts

ROWS_THEN_HALF = [{"name": "fopru_row", "keep": 0.5}, {"name": "random", "keep": 0.5, "seed": 1}]


@pytest.mark.parametrize("images", [[1], [1, 3, 0]], ids=str)
@pytest.mark.parametrize(
    "members",
    [
        ROWS_THEN_HALF,
        [{"name": "downsample", "keep": 0.5}, {"name": "fopru_rank", "keep": 0.5}],
        [{"name": "uniform", "keep": 0.5}, {"name": "fopru_rank", "keep": 0.25, "positions": "original"}],
    ],
    ids=lambda members: "-".join(each["name"] for each in members),
)
def test_the_invariants_hold(llava: Model, members: Any, images: list[int]) -> None:
    check_reducer(create("chain", reducers=members), llava, prompts(llava, images))


def test_a_chain_of_one_is_that_one(llava: Model) -> None:
    inputs = prompts(llava, [1, 2])
    found = []
    for reducer in (create("fopru_rank"), create("chain", reducers=[{"name": "fopru_rank"}])):
        with reduce_tokens(llava, reducer) as attachment, torch.no_grad():
            found.append((llava(**inputs).logits, attachment.samples))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_the_second_sees_what_the_first_left(llava: Model) -> None:
    with reduce_tokens(llava, create("chain", reducers=ROWS_THEN_HALF)) as attachment, torch.no_grad():
        llava(**prompts(llava, [1]))
    rows, half = attachment.samples[0].images[0].steps
    assert (len(rows.index), len(half.index)) == (18, 9)
    assert set(half.index) <= set(rows.index)


def test_what_is_gone_before_the_language_model_is_still_counted(llava: Model) -> None:
    members = [{"name": "no_image"}, {"name": "fastv"}]
    with reduce_tokens(llava, create("chain", reducers=members)) as attachment, torch.no_grad():
        llava(**prompts(llava, [1]))
    (sample,) = attachment.samples
    assert sample.entering == 0
    assert len(sample.lengths) == 4
    assert prefill_cost(llava, attachment.samples)[0].layer_mean == 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "a chain of no reducers"),
        (["fopru_row"], "give a name and knobs"),
        ([{"name": "fopru_ro"}], "did you mean 'fopru_row'"),
        ([{"name": "fopru_row", "kep": 1}], "did you mean 'keep'"),
    ],
)
def test_a_chain_that_means_nothing_is_refused(members: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("chain", reducers=members)


def test_its_members_sources_and_knobs_are_its_identity() -> None:
    one, other = (create("chain", reducers=[{"name": "random", "seed": seed}]) for seed in (0, 1))
    assert reducer_identity(one) != reducer_identity(other)
    assert one.knobs() == {"reducers": [{"name": "random", **create("random").knobs()}]}
