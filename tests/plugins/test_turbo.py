"""Turbo merges what its formula says, written out in plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokenreduce import create
from tokenreduce.reducer import Grid, Span, Tile
from tokenreduce_plugins.tome import ToMe, Turbo, match

from .clip import encode, opened, projected
from .golden import GEOMETRY, random, show, stored

KEYS = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1], [1, 0.9]])
ATTENTION = torch.tensor([0.4, 0.1, 0.02, 0.1, 0.2, 0.18])


def merged(keys: Tensor, features: Tensor, sizes: Tensor, loss: Tensor, merges: int) -> tuple[Tensor, Tensor]:
    """One block with a class token at place 0, token by token: what is left, ``(rows, dim)``, and how much it holds."""
    sequence = range(len(keys))
    evens, odds = sequence[2::2], sequence[1::2]
    candidates = []
    for even in evens:
        cosines = [float(keys[even] @ keys[odd] / keys[even].norm() / keys[odd].norm()) for odd in odds]
        best = max(range(len(odds)), key=cosines.__getitem__)
        candidates.append((cosines[best] - float(loss[even]), even, odds[best]))
    gone = sorted(candidates, reverse=True)[:merges]
    weighted, held = features * sizes[:, None], sizes.clone()
    for _, even, odd in gone:
        weighted[odd] += weighted[even]
        held[odd] += held[even]
    left = [0, *(even for even in evens if even not in [each for _, each, _ in gone]), *odds]
    return weighted[left] / held[left, None], held[left]


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma", "block"), [(5.0, 1.0, 0.0, 7), (0.05, 0.5, 0.0, 2), (0.05, 0.5, 5.0, 2), (0, 1.0, 0, 3)]
)
def test_a_block_is_the_formula_in_plain_loops(alpha: float, beta: float, gamma: float, block: int) -> None:
    heads, tokens = 3, 41
    keys, features = random(heads, tokens, 8, seed=block), random(tokens, 5, seed=1)
    sizes = torch.randint(1, 5, (tokens,), generator=torch.Generator().manual_seed(2)).float()
    attention = random(heads, 1, tokens, seed=3).softmax(dim=-1)
    loss = 30 * alpha * beta ** abs(gamma - block) * attention.mean(dim=0)[0]
    expected, held = merged(keys.mean(dim=0), features, sizes, loss, merges=9)

    reducer = Turbo(keep=1, per_block=9, alpha=alpha, beta=beta, gamma=gamma)
    step = reducer.steps(GEOMETRY)[block]
    view = stored(attention, slice(1, None), class_token=0, keys=keys)
    carried = torch.arange(tokens - 1), sizes[1:]
    selection = show(reducer, step, features[1:], {step.sees[0]: view}, carried=carried)
    assert selection.features is not None and selection.size is not None
    assert_close(selection.features, expected[1:])
    assert_close(selection.size, held[1:])


def test_worked_example() -> None:
    assert match(KEYS, 1, class_token=False)[1][4] == match(KEYS, 1, class_token=False)[1][5]
    _, source = match(KEYS, 1, False, 1.5 * ATTENTION)
    assert source[2] == source[3]  # the one that nothing attends to goes first
    assert len({*source.tolist()}) == 5


def test_without_a_class_token_the_attention_of_all_tokens_stands_in() -> None:
    reducer = Turbo(keep=1, per_block=1, alpha=1.5 / 30)
    step = reducer.steps(replace(GEOMETRY, class_token=False))[0]
    view = stored(ATTENTION.expand(1, 6, 6), slice(0, None), keys=KEYS[None])
    selection = show(reducer, step, KEYS, {step.sees[0]: view}, geometry=replace(GEOMETRY, class_token=False))
    assert selection.sources(6)[2] == selection.sources(6)[3]


def test_a_sequence_below_the_threshold_is_left_alone() -> None:
    reducer = Turbo(keep=1, per_block=30, threshold=40)
    step = reducer.steps(GEOMETRY)[0]
    counts = [reducer.count(step, Span(GEOMETRY, (Tile(Grid(24, 24)),), 576, left)) for left in (576, 39, 38)]
    assert counts == [546, 20, 38]  # 39 patches and a class token are 40


def test_the_presets_of_the_official_scripts() -> None:
    left = {}
    for name in ("turbo_r30", "turbo_r40"):
        reducer, current = create(name), 576
        for step in reducer.steps(GEOMETRY)[:12]:  # BLIP's depth
            current = reducer.count(step, Span(GEOMETRY, (Tile(Grid(24, 24)),), 576, current))  # type: ignore[assignment]
        left[name] = current
    assert left == {"turbo_r30": 576 - 12 * 30, "turbo_r40": 576 - 12 * 40}


def literal(pixels: Tensor, keep: int, alpha: float) -> Tensor:
    """The features ``(keep, dim)`` of one picture, from a loop over the tower's layers written out."""
    hidden, layers = opened(pixels)
    sizes = torch.ones(37)
    for layer in layers:
        queries, keys, values = projected(layer, hidden)
        weights = (queries @ keys.transpose(1, 2) * 8**-0.5 + sizes.log()).softmax(dim=-1)
        hidden = hidden + layer.self_attn.out_proj((weights @ values).transpose(0, 1).flatten(1))
        loss = 30 * alpha * weights[:, 0].mean(dim=0)
        merges = min(-(-(36 - keep) // 23), len(hidden) - 1 - keep, (len(hidden) - 1) // 2)
        hidden, sizes = merged(keys.mean(dim=0), hidden, sizes, loss, merges)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden[1:]


def test_inside_a_real_tower_it_is_the_literal_loop() -> None:
    pixels = random(1, 3, 84, 84)
    (found,) = encode(Turbo(keep=10, alpha=1.0), pixels).features
    with torch.no_grad():
        expected = literal(pixels[0], 10, alpha=1.0)
    order = (found[:, None] - expected).abs().sum(dim=-1).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(10))
    assert_close(found, expected[order], atol=5e-5, rtol=1e-4)
    (plain,) = encode(ToMe(keep=10), pixels).features
    assert (found - plain).abs().max() > 1e-2
