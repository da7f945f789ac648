"""TRIM keeps what the official code keeps, and the mean of the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import Keep, Selection, best
from tokenreduce.signals import Clip
from tokenreduce.testing import prompts
from tokenreduce.testing.clip import SEGMENT
from tokenreduce_plugins.trim import Trim, outliers, products

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show


def space(given: dict[str, Tensor], sample: int) -> Clip:
    """Stored states and text as the signal shows them."""
    width = given["ln_weight"].shape[0]
    normed = layer_norm(given["x"][sample], (width,), given["ln_weight"], given["ln_bias"])
    return Clip(normed @ given["proj"].T, given["text"][sample][None], torch.empty(0))


def reduced(features: Tensor, clip: Clip, keep: Keep | None) -> Selection:
    reducer = Trim(keep)
    (step,) = reducer.steps(GEOMETRY)
    return show(reducer, step, features, {step.sees[0]: clip})


def rows(features: Tensor, selection: Selection) -> Tensor:
    return features[selection.index] if selection.features is None else selection.features


@pytest.mark.parametrize("case", cases("trim"))
def test_official_vectors(case: Case) -> None:
    keep = None if case.settings["k"] < 0 else case.settings["k"]
    for sample, features in enumerate(case.given["x"]):
        found, kept = reduced(features, space(case.given, sample), keep), case.expected["kept"][sample].tolist()
        assert found.index.tolist() == [*kept, -1]
        assert_equal_floats(rows(features, found), case.expected["features"][sample])
        source = found.sources(len(features)).tolist()
        assert [source[token] for token in kept] == list(range(len(kept)))
        assert source.count(len(kept)) == len(features) - len(kept)


def test_mistakes_are_noticed() -> None:
    """The other sign in every sample, and cosines for products in four of five."""
    matches = torch.zeros(3, dtype=torch.long)
    for case in (parameter.values[0] for parameter in cases("trim")):
        for sample, kept in enumerate(case.expected["kept"]):
            clip = space(case.given, sample)
            cosines = products(replace(clip, patches=normalize(clip.patches, dim=-1)))
            scores = (-products(clip), products(clip), -cosines)
            matches += torch.tensor([best(each, len(kept)).equal(kept) for each in scores])
    assert matches.tolist() == [5, 0, 1]


WORKED = torch.tensor([0.1, 0.5, -3, 0.9, 0.3, 0, -2.6, 0.7, 0.2])


def worked(keep: Keep | None, values: Tensor = WORKED) -> tuple[list[int], Tensor]:
    features = random(len(values), 5)
    found = reduced(features, Clip(values[:, None], torch.ones(1, 1), torch.empty(0)), keep)
    return found.index.tolist(), rows(features, found) - features.mean(0)


def test_worked_example() -> None:
    """Softmaxes of .5214 and .3495 lie beyond the bound of .0413, and the others below."""
    shares = (-WORKED).softmax(-1)
    assert_equal_floats(shares[[2, 6]].round(decimals=4), torch.tensor([0.5214, 0.3495]))
    assert outliers(shares) == 2
    assert worked(None)[0] == worked(2 / 9)[0] == worked(3)[0] == [2, 6, -1]
    features = random(9, 5)
    found = reduced(features, Clip(WORKED[:, None], torch.ones(1, 1), torch.empty(0)), None)
    assert_equal_floats(rows(features, found)[2], features[[0, 1, 3, 4, 5, 7, 8]].mean(0))


def test_a_batch_shares_what_stands_out_in_the_official_code() -> None:
    """Nine and nine tokens of which three stand out in all: int(9 * 3 / 18) of each."""
    shares = torch.stack([WORKED, torch.linspace(0, 0.2, 9).index_fill(0, torch.tensor([4]), -3.0)])
    assert outliers((-shares).softmax(-1)) == 1
    assert outliers((-shares[0]).softmax(-1)) == 2


@pytest.mark.parametrize(("keep", "left"), [(1.0, 9), (9, 9), (20, 9), (8, 8), (1, 1), (0.1, 1), (0.89, 9), (0.5, 5)])
def test_counts(keep: Keep, left: int) -> None:
    index, _ = worked(keep)
    assert len(index) == left
    assert (-1 not in index) == ((keep == 1.0 and left == 9) or keep in (9, 20)), "of all there is no mean of others"


def test_where_nothing_stands_out_the_mean_is_all_that_is_left() -> None:
    index, apart = worked(None, torch.ones(9))
    assert index == [-1]
    assert_equal_floats(apart, torch.zeros(1, 5))


def test_the_question_decides(llava: LlavaForConditionalGeneration, clip: Path) -> None:
    def kept(question: str, **knobs: Any) -> list[tuple[int, ...]]:
        reducer = create("trim", clip=str(clip), **knobs)
        with reduce_tokens(llava, reducer, question=question) as attachment, torch.no_grad():
            llava(**prompts(llava, [2, 1]))
        return [tuple(image.kept) for sample in attachment.samples for image in sample.images]

    first, second = (kept(question, keep=6) for question in ("what colour is the square ?", "how many are there ?"))
    assert {len(each) for each in first} == {6}
    assert first != second
    many = "red " * (SEGMENT - 2)  # with the tokens that begin and end a text
    assert kept(many + "blue circle", keep=6) == kept(many, keep=6), "what is too long for the text tower is cut off"
    assert kept("blue circle " + many, keep=6) != kept(many, keep=6)
