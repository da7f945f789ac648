"""PruMerge and PruMerge+ keep and merge what the official code does, on stored tensors and on a real vision tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokenreduce.reducer import Selection, TokenReducer
from tokenreduce.signals import Attention, EncoderAttention
from tokenreduce_plugins.prumerge import PruMerge, PruMergePlus

from .clip import assert_equal_states, encode
from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show

METHODS = {"prumerge": PruMerge, "prumerge_plus": PruMergePlus}


def run(reducer: PruMerge, queries: Tensor, keys: Tensor, hidden: Tensor, heads: int = 1) -> Selection:
    """On queries and keys ``(sequence, dim)`` of the last layer, the class token first."""

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(0, 1)

    view = Attention(split(queries), split(keys), split(keys), 1.0, visual=torch.arange(1, len(hidden)), class_token=0)
    (step,) = reducer.steps(GEOMETRY)
    return show(reducer, step, hidden[1:], {EncoderAttention(-1): view})


@pytest.mark.parametrize("heads", [1, 4])  # the official code takes all heads as one
@pytest.mark.parametrize("case", cases("prumerge"))
def test_official_vectors(case: Case, heads: int) -> None:
    queries, keys, hidden = (case.given[name] for name in ("q", "k", "hidden"))
    selection = run(METHODS[case.settings["variant"]](), queries, keys, hidden, heads)
    outliers = case.expected["topk_order"]
    assert selection.index[: len(outliers)].equal(outliers)
    assert selection.index[-1] == -1
    assert selection.features is not None
    assert_equal_floats(selection.features, case.expected["tokens"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", cases("e2e_prumerge"))
def test_official_vectors_on_a_real_tower(case: Case, attention: str) -> None:
    done = encode(PruMerge(), case.given["pixel_values"], attention)
    assert list(done.images[0].kept) == [*case.expected["topk_order"].tolist(), -1]
    assert_equal_states(done.features[0], case.expected["tokens"][0])


@pytest.mark.parametrize("mistake", [PruMerge(layer=-2), PruMerge(factor=3.0)])
def test_another_layer_or_threshold_keeps_others(mistake: TokenReducer) -> None:
    (case,) = cases("e2e_prumerge")[1].values
    assert isinstance(case, Case)
    (image,) = encode(mistake, case.given["pixel_values"]).images
    assert list(image.kept) != [*case.expected["topk_order"].tolist(), -1]


@pytest.mark.parametrize(
    ("outliers", "points", "stride"),
    [(8, 24, 24), (16, 48, 12), (24, 72, 8), (32, 96, 6), (40, 144, 4), (60, 192, 3), (95, 288, 2), (140, 575, 1)],
)
def test_the_stride_of_the_plus_variant(outliers: int, points: int, stride: int) -> None:
    found = torch.arange(575 - outliers, 575)
    grid = PruMergePlus().spread(found, 576)
    assert set(grid.tolist()) == set(range(0, 575, stride)) - set(found.tolist())
    assert len(range(0, 575, stride)) == points


def test_worked_example() -> None:
    weights = torch.tensor([0.5, 0.3, 0.1, 0.1])
    angles = torch.deg2rad(torch.tensor([0.0, 80, 200, 350]))  # nearest to 0 is 3, nearest to 1 is 0
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)

    class Toy(PruMerge):
        """Keeps the first two, whatever their scores."""

        def spread(self, outliers: Tensor, total: int) -> Tensor:
            return torch.arange(2)

    # One wide head: two dimensions of direction, which the query does not see, and one that gives the weights.
    keys = torch.cat([directions * 30, weights.log()[:, None] * 3**0.5], dim=1)
    keys = torch.cat([torch.tensor([[0.0, 0, -1e4]]), keys])
    query = torch.tensor([[0.0, 0.0, 1.0]]).expand(5, -1)
    hidden = torch.tensor([0.0, 1, 2, 3, 4])[:, None]
    features = run(Toy(factor=100.0, neighbours=1), query, keys, hidden).features
    assert features is not None
    assert_close(features[:, 0], torch.tensor([1.4, 2.5, 0.7]))


def test_raster_order_keeps_the_same_rows() -> None:
    queries, keys, hidden = random(65, 16), random(65, 16, seed=1), random(65, 16, seed=2)
    queries[0] *= 4
    scored, raster = (run(PruMerge(order=order), queries, keys, hidden) for order in ("score", "raster"))
    assert scored.index[:-1].tolist() != raster.index[:-1].tolist() == sorted(scored.index[:-1].tolist())
    assert scored.features is not None and raster.features is not None
    assert_close(scored.features[scored.index.argsort()], raster.features[raster.index.argsort()])


@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
def test_without_outliers_one_row_holds_the_picture(method: type[PruMerge]) -> None:
    hidden = random(17, 4)
    selection = run(method(), torch.zeros(17, 8), random(17, 8), hidden)
    assert selection.index.tolist() == [-1]
    assert selection.features is not None
    assert_close(selection.features[0], hidden[1:].sum(dim=0) / 17)


def test_without_a_class_token_attention_received_decides() -> None:
    geometry = replace(GEOMETRY, class_token=False)
    queries, keys = random(2, 64, 8), 3 * random(2, 64, 8, seed=1)
    view = Attention(queries, keys, keys, 1.0, visual=slice(0, None))
    reducer = PruMerge()
    (step,) = reducer.steps(geometry)
    selection = show(reducer, step, random(64, 4), {EncoderAttention(-1): view}, geometry=geometry)
    wide = (queries.transpose(0, 1).flatten(1) @ keys.transpose(0, 1).flatten(1).T / 4).softmax(dim=-1).mean(dim=0)
    assert selection.index[:-1].tolist() == wide.argsort(descending=True)[: len(selection.index) - 1].tolist()
