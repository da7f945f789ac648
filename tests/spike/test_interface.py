"""The six methods give what their official implementations gave, index for index."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokenreduce.reducer import Geometry, Grid, Span, Step
from tokenreduce.signals import (
    Attention,
    ClassToken,
    EncoderAttention,
    LookAheadAttention,
    ProjectedFeatures,
    TextEmbeddings,
    TokenSizes,
)

from . import flowcut, sparsevlm, tome
from .flowcut import AtFlow, FlowCut
from .golden import Case, assert_equal_floats, cases, random, show, stored, walk
from .pyramiddrop import PyramidDrop
from .sparsevlm import SparseVlm
from .tome import AtMerge, ToMe
from .visionzip import VisionZip

GEOMETRY = Geometry(encoder_layers=24, decoder_layers=32, class_token=True)


def zip_once(
    attention: Tensor, hidden: Tensor, metric: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """VisionZip on ``(heads, rows, sequence)`` attention: places in the sequence with the class token, and features."""
    reducer = VisionZip(keep=dominant + contextual, contextual=contextual)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(attention, slice(1, None), class_token=0, keys=metric[None])
    selection = show(reducer, step, hidden[1:], {EncoderAttention(-2): view, ClassToken(): hidden[0]})
    assert selection.features is not None
    return selection.index + 1, selection.features


@pytest.mark.parametrize("case", cases("visionzip"))
def test_visionzip(case: Case) -> None:
    dominant, contextual = case.settings["dominant"], case.settings["contextual"]
    for sample in range(case.settings["B"]):
        attention, hidden, metric = (case.given[name][sample] for name in ("attn", "hidden", "metric"))
        index, features = zip_once(attention, hidden, metric, dominant, contextual)
        assert index[:dominant].equal(case.expected["dominant_indices"][sample])
        assert_equal_floats(features, case.expected["features"][sample])


def test_visionzip_worked_example() -> None:
    attention = torch.tensor([0.1, 0.05, 0.20, 0.04, 0.15, 0.01, 0.10, 0.02, 0.30, 0.03])
    angles = torch.deg2rad(torch.tensor([0.0, 0, 200, 0, 210, 20, 90, 70, 220, 100]))
    metric = torch.stack([angles.cos(), angles.sin()], dim=1)
    index, features = zip_once(attention[None, None], torch.arange(10.0)[:, None], metric, 4, 2)
    assert index.tolist() == [0, 2, 4, 8, 1, 6]
    assert_close(features[:, 0], torch.tensor([0.0, 2, 4, 8, 5, 14]))


def test_visionzip_without_a_class_token_keeps_its_count() -> None:
    reducer = VisionZip(keep=12)
    geometry = Geometry(encoder_layers=24, decoder_layers=32, class_token=False)
    (step,) = reducer.steps(geometry)
    view = stored(random(2, 49, 49).softmax(dim=-1), slice(0, None), keys=random(2, 49, 8))
    selection = show(reducer, step, random(49, 5), {EncoderAttention(-2): view})
    assert selection.index.min() >= 0
    assert selection.sources(49).unique().tolist() == list(range(12))


def rotate(states: Tensor, theta: float) -> Tensor:
    """Rotary embedding of ``(heads, sequence, head_dim)`` at positions 0, 1, 2 ..."""
    length, width = states.shape[-2:]
    frequencies = theta ** -(torch.arange(0, width, 2) / width)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
    half = torch.cat([-states[..., width // 2 :], states[..., : width // 2]], dim=-1)
    return states * angles.cos() + half * angles.sin()


@pytest.mark.parametrize("case", cases("pyramiddrop"))
def test_pyramiddrop(case: Case) -> None:
    heads, prefix, count = (case.settings[name] for name in ("heads", "prefix", "N"))
    states = case.given["features"]
    before, after = states[:prefix], states[prefix + count :]

    def look_ahead(step: Step, visual: Tensor) -> dict[Hashable, Any]:
        sequence = torch.cat([before, visual, after])
        normed = sequence * torch.rsqrt(sequence.square().mean(dim=-1, keepdim=True) + 1e-5) * case.given["norm_weight"]
        queries, keys = (
            rotate(
                (normed @ case.given[name].T).unflatten(-1, (heads, -1)).transpose(0, 1), case.settings["rope_theta"]
            )
            for name in ("q_weight", "k_weight")
        )
        view = Attention(
            queries,
            keys,
            keys,
            case.settings["head_dim"] ** -0.5,
            visual=slice(prefix, prefix + len(visual)),
            causal=True,
        )
        return {LookAheadAttention(): view}

    ratios = case.settings["ratios"]
    for stages in range(1, len(ratios) + 1):
        reducer = PyramidDrop(layers=tuple(range(8, 8 + stages)), ratios=tuple(ratios[:stages]))
        kept = walk(reducer, GEOMETRY, states[prefix : prefix + count], look_ahead).index
        assert kept.equal(case.expected[f"kept_image_stage{stages - 1}"])


def test_pyramiddrop_worked_example() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.8, 0.4, 0.7, 0.5, 0.6])[:, None]

    def look_ahead(step: Step, visual: Tensor) -> dict[Hashable, Any]:
        keys = torch.cat([torch.zeros(2, 1), visual, torch.zeros(3, 1)])[None]
        return {LookAheadAttention(): Attention(torch.ones_like(keys), keys, keys, 1.0, slice(2, 2 + len(visual)))}

    done = walk(PyramidDrop(ratios=(0.5, 0.25, 0.125)), GEOMETRY, scores, look_ahead)
    assert done.counts == [4, 2, 1]
    assert done.index.tolist() == [1]


@pytest.mark.parametrize("case", cases("sparsevlm_topk"))
def test_sparsevlm_keeps(case: Case) -> None:
    prefix, count = case.settings["prefix"], case.settings["N"]
    reducer = SparseVlm(layers=(2, 6, 15), keeps=tuple(case.settings["keep_list"]))
    step = reducer.steps(GEOMETRY)[(2, 6, 15).index(case.settings["layer"])]
    text = torch.arange(prefix + count, prefix + count + case.settings["text"])
    view = stored(case.given["attn"], slice(prefix, prefix + count), text=text)
    raters = case.given["raters"].nonzero()[:, 0]
    signals = {step.sees[0]: view, TextEmbeddings(): random(case.settings["text"], 4)}

    selection = show(reducer, step, random(count, 4), signals, carried=raters)
    kept = selection.index[: len(case.expected["kept"])]
    assert kept.equal(case.expected["kept"])
    assert_equal_floats(view.mean(text[raters]).mean(dim=0), case.expected["score"])
    pruned = count - len(kept)
    assert (selection.sources(count) >= len(kept)).sum() == int(0.3 * pruned) + 1
    assert selection.carry.equal(raters)


@pytest.mark.parametrize("case", cases("sparsevlm_merge"))
def test_sparsevlm_merges(case: Case) -> None:
    centres, cluster, merged = sparsevlm.cluster_and_merge(case.given["x"], case.settings["clusters"])
    assert_equal_floats(merged, case.expected["merged"])
    assert cluster[centres].tolist() == list(range(case.settings["clusters"]))


def test_sparsevlm_published_counts() -> None:
    def attention(step: Step, visual: Tensor) -> dict[Hashable, Any]:
        behind = 35 + len(visual)
        rows = random(2, behind + 10, behind + 10).softmax(dim=-1)
        view = stored(rows, slice(35, behind), text=torch.arange(behind, behind + 10))
        return {step.sees[0]: view, ProjectedFeatures(): projected, TextEmbeddings(): random(10, 4, seed=1)}

    projected = random(576, 4)
    assert walk(SparseVlm(), GEOMETRY, projected, attention).counts == [309, 204, 113]


def test_sparsevlm_worked_example() -> None:
    rows = torch.zeros(1, 14, 14)
    first = torch.tensor([0.01, 0.09, 0.03, 0.02, 0.08, 0.04, 0.07, 0.05, 0.06])
    rows[0, 11, 2:11], rows[0, 13, 2:11] = first, first.flip(0) / 2
    for keep, expected in ((4, [1, 4, 6, 7]), (3, [1, 4, 7]), (2, [1, 4])):
        reducer = SparseVlm(layers=(2,), keeps=(keep,))
        (step,) = reducer.steps(GEOMETRY)
        signals = {step.sees[0]: stored(rows, slice(2, 11), text=torch.arange(11, 14)), TextEmbeddings(): random(3, 4)}
        selection = show(reducer, step, random(9, 4), signals, carried=torch.tensor([0, 2]))
        assert selection.index[:keep].tolist() == expected


def test_sparsevlm_raters_are_the_words_above_the_mean() -> None:
    visual, text = torch.eye(3), torch.tensor([[5.0, 5, 5], [0, 0, 0], [1, 1, 1], [5, 5, 5]])
    assert sparsevlm.telling(visual, text).tolist() == [0, 3]


@pytest.mark.parametrize("case", cases("flowcut_functions"))
def test_flowcut_functions(case: Case) -> None:
    counts = []
    for sample in range(case.settings["B"]):
        looked_at, likeness, values = (case.given[name][sample] for name in ("attn", "semantic", "value"))
        assert_equal_floats(flowcut.score(looked_at, likeness, values), case.expected["score"][sample])
        counts.append(flowcut.pruned(looked_at, case.settings["rpl"], case.settings["target_patches"]))
    assert max(counts) == case.expected["n_prune"].item()


def encoder_view(step: Step, patches: int, class_token: bool) -> Attention:
    """A random attention layer, another one for every step."""
    seed = dataclasses.astuple(step)[2]
    length = patches + class_token
    queries, keys, values = (random(4, length, 8, seed=3 * seed + part) for part in range(3))
    queries = queries + 2  # or the mean query would look at all patches alike
    return Attention(
        queries, keys, values, 8**-0.5, visual=slice(int(class_token), None), class_token=0 if class_token else None
    )


@pytest.mark.parametrize("class_token", [True, False])
def test_flowcut_reaches_its_target_step_by_step(class_token: bool) -> None:
    geometry = Geometry(encoder_layers=24, decoder_layers=32, class_token=class_token)
    done = walk(
        FlowCut(keep=30),
        geometry,
        random(144, 4),
        lambda step, patches: {step.sees[0]: encoder_view(step, len(patches), class_token)},
    )
    assert len(done.counts) == 22
    assert done.counts[-1] == 30
    assert done.counts[0] == 144  # 21 layers remain after the first: an odd number
    assert done.counts == sorted(done.counts, reverse=True)
    assert len(set(done.counts)) > 3
    assert all(done.counts[layer] == done.counts[layer - 1] for layer in range(2, 22, 2))
    assert done.index.tolist() == sorted(done.index.tolist())


def test_flowcut_accumulates_over_the_layers_that_it_passes() -> None:
    reducer = FlowCut(keep=8)
    looking, pruning = reducer.steps(GEOMETRY)[:2]
    layers = [encoder_view(step, 36, class_token=True) for step in (looking, pruning)]
    flows = []
    for layer in layers:
        values, looked_at = layer.values[:, 1:], layer.rows(0).mean(dim=(0, 1))[1:]
        likeness = (layer.values @ layer.values[:, 0, :, None])[..., 0].softmax(dim=-1).mean(dim=0)[1:]
        flows.append(flowcut.score(looked_at, likeness, values.mean(dim=0)))

    first = show(reducer, looking, random(36, 4), {looking.sees[0]: layers[0]})
    assert first.index.tolist() == list(range(36))
    assert_close(first.carry, flows[0])
    second = show(reducer, pruning, random(36, 4), {pruning.sees[0]: layers[1]}, carried=first.carry)
    total = (flows[0] + flows[1]) / 2
    assert 8 < len(second.index) < 36
    assert second.index.tolist() == sorted(total.topk(len(second.index)).indices.tolist())
    assert_close(second.carry, total[second.index])


def test_flowcut_worked_example() -> None:
    reducer = FlowCut(keep=2)
    looked_at = torch.tensor([[0.30, 0.05, 0.20, 0.05, 0.25, 0.15], [0.60, 0.02, 0.18, 0.05, 0.10, 0.05]])
    likeness = torch.tensor([[0.10, 0.20, 0.20, 0.10, 0.30, 0.10], [0.2, 0.2, 0.2, 0.1, 0.2, 0.1]])
    values = torch.tensor([[2.0, 1, 1, 1, 1, 2], [1.0, 1, 1, 1, 1, 1]])
    flows = [flowcut.score(*layer) for layer in zip(looked_at, likeness, values[..., None], strict=True)]
    assert_close(flows[0], torch.tensor([0.80, 0.25, 0.40, 0.15, 0.55, 0.50]))
    total = 0.5 * flows[0] + 0.5 * flows[1]
    assert_close(total, torch.tensor([0.80, 0.235, 0.39, 0.15, 0.425, 0.325]))
    assert flowcut.pruned(looked_at[1], remaining=4, target=2) == 1
    step = next(step for step in reducer.steps(GEOMETRY) if isinstance(step, AtFlow) and step.remaining == 4)
    assert reducer.count(step, Span((Grid(2, 3),), 6, 6)) is None


@pytest.mark.parametrize("case", cases("tome"))
def test_tome(case: Case) -> None:
    class_token, merges = case.settings["class_token"], case.settings["r"]
    first = int(class_token)
    reducer = ToMe(keep=1, merges=merges)
    step = reducer.steps(GEOMETRY)[3]
    for sample in range(case.settings["B"]):
        metric, features, sizes = (case.given[name][sample] for name in ("metric", "x", "size"))
        view = stored(torch.empty(0), slice(first, None), class_token=0 if class_token else None, keys=metric[None])
        signals = {step.sees[0]: view, TokenSizes(): sizes[first:, 0]}
        selection = show(reducer, step, features[first:], signals)
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
def test_tome_worked_example(merges: int, class_token: bool, values: list[float]) -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 50, 8, 52, 90, 130, 100, 180]))
    metric = torch.stack([angles.cos(), angles.sin()], dim=1)
    first = int(class_token)
    reducer = ToMe(keep=1, merges=merges)
    step = reducer.steps(GEOMETRY)[0]
    view = stored(torch.empty(0), slice(first, None), class_token=0 if class_token else None, keys=metric[None])
    selection = show(
        reducer, step, torch.arange(8.0)[first:, None], {step.sees[0]: view, TokenSizes(): torch.ones(8 - first)}
    )
    assert selection.features is not None
    assert selection.features[:, 0].tolist() == pytest.approx(values)


@pytest.mark.parametrize("class_token", [True, False])
def test_tome_reaches_its_budget_and_gives_back_the_raster_order(class_token: bool) -> None:
    geometry = Geometry(encoder_layers=24, decoder_layers=32, class_token=class_token)

    def signals(step: Step, patches: Tensor) -> dict[Hashable, Any]:
        return {step.sees[0]: encoder_view(step, len(patches), class_token)} if isinstance(step, AtMerge) else {}

    features = random(100, 3)
    done = walk(ToMe(keep=31), geometry, features, signals)
    assert done.counts[:2] == [97, 94]  # ceil(69 / 23) = 3 a block
    assert done.counts[-1] == 31
    assert done.index.tolist() == sorted(done.index.tolist())


def test_tome_merges_the_most_similar_pair() -> None:
    index, source = tome.match(torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]]), 1, class_token=False)
    assert (index.tolist(), source.tolist()) == ([2, 1, 3], [1, 1, 0, 2])
