"""ToMe merges what the official code merges, and hands the raster order on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokenreduce.reducer import AtEncoder, Step
from tokenreduce.signals import Attention
from tokenreduce_plugins.tome import ToMe, match

from .clip import encode, opened, projected
from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored, walk


@pytest.mark.parametrize("case", cases("tome"))
def test_official_vectors(case: Case) -> None:
    class_token, merges = case.settings["class_token"], case.settings["r"]
    first = int(class_token)
    reducer = ToMe(keep=1, per_block=merges)
    step = reducer.steps(GEOMETRY)[3]
    for sample in range(case.settings["B"]):
        metric, features, sizes = (case.given[name][sample] for name in ("metric", "x", "size"))
        view = stored(torch.empty(0), slice(first, None), class_token=0 if class_token else None, keys=metric[None])
        carried = torch.arange(len(features) - first), sizes[first:, 0]
        selection = show(reducer, step, features[first:], {step.sees[0]: view}, carried=carried)
        assert selection.features is not None and selection.size is not None
        expected = {name: case.expected[name][sample] for name in ("x", "size", "source")}
        assert_equal_floats(selection.features, expected["x"][first:])
        assert_equal_floats(selection.size, expected["size"][first:, 0])
        members = torch.nn.functional.one_hot(selection.sources(len(view.keys[0]) - first)).T
        assert members.equal(expected["source"][first:, first:].long())
        if class_token:  # what the encoder does with a class token that no reducer is shown
            assert expected["source"][0].nonzero().tolist() == [[0]]
            assert_close(expected["x"][0], features[0])


@pytest.mark.parametrize(
    ("merges", "class_token", "values"),
    [
        (1, False, [4, 2, 0, 1, 3, 5.5, 7]),
        (2, False, [2, 0, 1, 3.5, 5.5, 7]),
        (4, False, [1, 3.5, 5.5, 7]),
        (1, True, [2, 4, 1, 3, 5.5, 7]),
        (2, True, [2, 1, 3.5, 5.5, 7]),
        (4, True, [1.5, 3.5, 5.5, 7]),
    ],
)
def test_worked_example(merges: int, class_token: bool, values: list[float]) -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 50, 8, 52, 90, 130, 100, 180]))
    metric = torch.stack([angles.cos(), angles.sin()], dim=1)
    first = int(class_token)
    reducer = ToMe(keep=1, per_block=merges)
    step = reducer.steps(GEOMETRY)[0]
    view = stored(torch.empty(0), slice(first, None), class_token=0 if class_token else None, keys=metric[None])
    selection = show(reducer, step, torch.arange(8.0)[first:, None], {step.sees[0]: view})
    assert selection.features is not None
    assert selection.features[:, 0].tolist() == pytest.approx(values)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_budget_is_reached_and_raster_order_comes_back(class_token: bool) -> None:
    def signals(step: Step, patches: Tensor) -> dict[Hashable, Any]:
        if not isinstance(step, AtEncoder) or not isinstance(step.layer, int):
            return {}
        keys = random(4, len(patches) + class_token, 8, seed=step.layer)
        return {
            step.sees[0]: Attention(
                keys, keys, keys, 1.0, slice(int(class_token), None), class_token=0 if class_token else None
            )
        }

    done = walk(ToMe(keep=31), replace(GEOMETRY, class_token=class_token), random(100, 3), signals)
    assert done.counts[:2] == [97, 94]  # ceil(69 / 23) = 3 a block
    assert done.counts[-1] == 31
    assert done.index.tolist() == sorted(done.index.tolist())


def test_the_most_similar_pair_is_merged() -> None:
    index, source = match(torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]]), 1, class_token=False)
    assert (index.tolist(), source.tolist()) == ([2, 1, 3], [1, 1, 0, 2])


def literal(pixels: Tensor, keep: int, proportional: bool) -> Tensor:
    """The features ``(keep, dim)`` of one picture, from a loop over the tower's layers written out."""
    hidden, layers = opened(pixels)
    members = torch.eye(36)
    for layer in layers:
        queries, keys, values = projected(layer, hidden)
        logits = queries @ keys.transpose(1, 2) * 8**-0.5
        if proportional:
            logits[:, :, 1:] += members.sum(dim=1).log()
        hidden = hidden + layer.self_attn.out_proj((logits.softmax(dim=-1) @ values).transpose(0, 1).flatten(1))
        merges = min(-(-(36 - keep) // 23), len(members) - keep, len(members) // 2)
        _, source = match(keys.mean(dim=0)[1:], merges, class_token=True)
        into = torch.nn.functional.one_hot(source).T.float()
        held, members = members.sum(dim=1), into @ members
        merged = into @ (held[:, None] * hidden[1:]) / members.sum(dim=1)[:, None]
        hidden = torch.cat([hidden[:1], merged])
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden[1:]


@pytest.mark.parametrize("proportional", [True, False])
def test_inside_a_real_tower_it_is_the_literal_loop(proportional: bool) -> None:
    pixels = random(2, 3, 84, 84)
    done = encode(ToMe(keep=10, proportional=proportional), pixels)
    for picture in range(2):
        with torch.no_grad():
            expected = literal(pixels[picture], 10, proportional)
        kept = list(done.images[picture].kept)
        assert kept == sorted(kept)
        found = done.features[picture]
        order = (found[:, None] - expected).abs().sum(dim=-1).argmin(dim=1)
        assert sorted(order.tolist()) == list(range(10))
        assert_close(found, expected[order], atol=5e-5, rtol=1e-4)


def test_proportional_attention_changes_the_features() -> None:
    pixels = random(1, 3, 84, 84)
    (with_sizes,), (without,) = (encode(ToMe(keep=10, proportional=each), pixels).features for each in (True, False))
    assert (with_sizes - without).abs().max() > 1e-2
