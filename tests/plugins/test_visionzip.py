"""VisionZip keeps and merges what the official code does, on stored tensors and on a real vision tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokenreduce.reducer import TokenReducer
from tokenreduce.signals import ClassToken, EncoderAttention
from tokenreduce_plugins.visionzip import VisionZip

from .clip import assert_equal_states, encode
from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored


def zip_once(
    attention: Tensor, hidden: Tensor, metric: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """On attention ``(heads, rows, sequence)``: places in the sequence with the class token, and features."""
    reducer = VisionZip(keep=dominant + contextual, contextual=contextual)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(attention, slice(1, None), class_token=0, keys=metric[None])
    selection = show(reducer, step, hidden[1:], {EncoderAttention(-2): view, ClassToken(): hidden[0]})
    assert selection.features is not None
    return selection.index + 1, selection.features


@pytest.mark.parametrize("case", cases("visionzip"))
def test_official_vectors(case: Case) -> None:
    dominant, contextual = case.settings["dominant"], case.settings["contextual"]
    for sample in range(case.settings["B"]):
        attention, hidden, metric = (case.given[name][sample] for name in ("attn", "hidden", "metric"))
        index, features = zip_once(attention, hidden, metric, dominant, contextual)
        assert index[:dominant].equal(case.expected["dominant_indices"][sample])
        assert_equal_floats(features, case.expected["features"][sample])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", cases("e2e_visionzip"))
def test_official_vectors_on_a_real_tower(case: Case, attention: str) -> None:
    dominant, contextual = case.settings["dominant"], case.settings["contextual"]
    done = encode(VisionZip(dominant + contextual, contextual=contextual), case.given["pixel_values"], attention)
    assert len(done.images) == case.settings["B"]
    for sample, image in enumerate(done.images):
        assert [place + 1 for place in image.kept[:dominant]] == case.expected["dominant_indices"][sample].tolist()
        assert_equal_states(done.features[sample], case.expected["features"][sample])


@pytest.mark.parametrize("mistake", [VisionZip(14, contextual=4, layer=-1), VisionZip(14, contextual=4, layer=-3)])
def test_another_layer_keeps_others(mistake: TokenReducer) -> None:
    (case,) = cases("e2e_visionzip")[0].values
    assert isinstance(case, Case)
    (image,) = encode(mistake, case.given["pixel_values"]).images
    assert [place + 1 for place in image.kept[:10]] != case.expected["dominant_indices"][0].tolist()


def test_worked_example() -> None:
    attention = torch.tensor([0.1, 0.05, 0.20, 0.04, 0.15, 0.01, 0.10, 0.02, 0.30, 0.03])
    angles = torch.deg2rad(torch.tensor([0.0, 0, 200, 0, 210, 20, 90, 70, 220, 100]))
    metric = torch.stack([angles.cos(), angles.sin()], dim=1)
    index, features = zip_once(attention[None, None], torch.arange(10.0)[:, None], metric, 4, 2)
    assert index.tolist() == [0, 2, 4, 8, 1, 6]
    assert_close(features[:, 0], torch.tensor([0.0, 2, 4, 8, 5, 14]))


def test_without_a_class_token_the_count_is_kept() -> None:
    reducer, geometry = VisionZip(keep=12), replace(GEOMETRY, class_token=False)
    (step,) = reducer.steps(geometry)
    view = stored(random(2, 49, 49).softmax(dim=-1), slice(0, None), keys=random(2, 49, 8))
    selection = show(reducer, step, random(49, 5), {EncoderAttention(-2): view}, geometry=geometry)
    assert selection.index.min() >= 0
    assert selection.sources(49).unique().tolist() == list(range(12))


@pytest.mark.parametrize(("keep", "contextual"), [(1, 10 / 64), (4, 4)])
def test_a_budget_without_room_for_the_class_token_is_refused(keep: int, contextual: int | float) -> None:
    reducer = VisionZip(keep, contextual=contextual)
    (step,) = reducer.steps(GEOMETRY)
    with pytest.raises(ValueError, match=f"keep={keep} leaves {keep} rows, too few"):
        show(reducer, step, random(49, 5))


def test_everything_can_be_kept() -> None:
    reducer = VisionZip(keep=1.0)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(random(2, 1, 50).softmax(dim=-1), slice(1, None), class_token=0, keys=random(2, 50, 8))
    selection = show(reducer, step, random(49, 5), {EncoderAttention(-2): view, ClassToken(): random(5)})
    assert len(selection.index) == 49


def test_every_patch_and_the_class_token_can_be_kept() -> None:
    """The contextual patches then have none to be merged with, as in the official code."""
    hidden, metric = random(10, 5), random(10, 8, seed=1)
    index, features = zip_once(random(2, 1, 10).softmax(dim=-1), hidden, metric, dominant=7, contextual=3)
    assert index.sort().values.tolist() == list(range(10))
    assert features.equal(hidden[index])


@pytest.mark.parametrize("contextual", [1, 2, 5])
def test_a_single_patch_that_is_left_is_every_contextual_row(contextual: int) -> None:
    """As in the official code, which gives more rows than there are patches and a class token."""
    attention, hidden = random(2, 1, 10).softmax(dim=-1), random(10, 5)
    index, features = zip_once(attention, hidden, random(10, 8, seed=1), dominant=9, contextual=contextual)
    left = 1 + int(attention[:, 0, 1:].sum(dim=0).argmin())
    assert index.tolist() == [*(place for place in range(10) if place != left), left, *[0] * (contextual - 1)]
    assert features[:9].equal(hidden[index[:9]])
    assert features[9:].equal(hidden[[left] * contextual])


@pytest.mark.parametrize(("keep", "contextual"), [(14, 4), (49, 12), (50, 13), (60, 12)])
def test_where_the_official_code_stops_this_goes_on(keep: int, contextual: int) -> None:
    reducer = VisionZip(keep, contextual=contextual)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(random(2, 1, 11).softmax(dim=-1), slice(1, None), class_token=0, keys=random(2, 11, 8))
    selection = show(reducer, step, random(10, 5), {EncoderAttention(-2): view, ClassToken(): random(5)})
    assert len(selection.index) == min(keep, 10 + contextual)
    assert selection.sources(10).min() >= 0
    assert sorted(place for place in selection.index.tolist() if place >= 0) == list(range(10))


def test_more_rows_than_patches_are_refused_where_a_prompt_has_no_place_for_them() -> None:
    (case,) = cases("e2e_visionzip")[0].values
    assert isinstance(case, Case)
    with pytest.raises(ValueError, match="keep=37 is more than the 36 visual tokens"):
        encode(VisionZip(37, contextual=4), case.given["pixel_values"])
