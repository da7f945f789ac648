"""LLaVolta pools as the official code does: in one dimension, each picture by itself."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.counts import Layout, layer_counts
from tokenreduce.reducer import AtDecoder, AtProjector, Grid, Tile
from tokenreduce.testing import prompts
from tokenreduce_plugins.llavolta import Llavolta

from .golden import GEOMETRY, random, show


def test_worked_example() -> None:
    reducer = Llavolta(stride=4, layer=2)
    selection = show(reducer, reducer.steps(GEOMETRY)[0], torch.arange(1.0, 11)[:, None])
    assert selection.features is not None and selection.source is not None
    assert selection.features[:, 0].tolist() == [2.5, 6.5]
    assert selection.source.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, -1, -1]
    assert (35 + selection.index).tolist() == [36, 40]  # 36.5 and 40.5, rounded down


@pytest.mark.parametrize(("tokens", "stride"), [(576, 8), (36, 5), (7, 3), (9, 1), (3, 8)])
def test_it_is_the_plain_loop(tokens: int, stride: int) -> None:
    features, reducer = random(tokens, 4), Llavolta(stride=stride, layer=2)
    selection = show(reducer, reducer.steps(GEOMETRY)[0], features)
    run = min(stride, tokens)
    for row, place in enumerate(selection.index.tolist()):
        members = range(row * run, row * run + run)
        torch.testing.assert_close(selection.features[row], sum(features[each] for each in members) / run)  # type: ignore[index]
        assert place == sum(members) // run
        assert [each for each, into in enumerate(selection.sources(tokens).tolist()) if into == row] == list(members)
    assert len(selection.index) == max(1, tokens // stride)


@pytest.mark.parametrize(("stride", "layer", "share"), [(8, 2, 0.1797), (8, 16, 0.5625), (4, 16, 0.625)])
def test_published_compression_rates(stride: int, layer: int, share: float) -> None:
    counts = layer_counts(Llavolta(stride=stride, layer=layer), GEOMETRY, Layout((Tile(Grid(24, 24)),)))
    assert sum(counts) / (32 * 576) == pytest.approx(share, abs=1e-4)


def test_presets() -> None:
    assert create("llavolta_heavy") == Llavolta()
    counts = [
        layer_counts(create(f"llavolta_{name}"), GEOMETRY, Layout((Tile(Grid(24, 24)),))) for name in ("heavy", "light")
    ]
    assert [each.index(72) for each in counts] == [2, 16]


def test_layer_0_is_before_the_language_model() -> None:
    assert [type(Llavolta(layer=layer).steps(GEOMETRY)[0]) for layer in (0, 1)] == [AtProjector, AtDecoder]


def test_every_picture_is_pooled_by_itself(llava: LlavaForConditionalGeneration) -> None:
    with reduce_tokens(llava, Llavolta(stride=8, layer=1)) as reduction:
        llava(**prompts(llava, [2]))
    assert [image.kept for image in reduction.samples[0].images] == [(3, 11, 19, 27)] * 2


@pytest.mark.parametrize(("keep", "stride"), [(1.0, 1), (0.5, 2), (0.125, 8), (0.3, 4), (0.1, 10)])
def test_a_ratio_is_one_over_the_stride(keep: float, stride: int) -> None:
    assert Llavolta().with_keep(keep).stride == stride


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TypeError, match="give a ratio"):
        Llavolta().with_keep(64)
    with pytest.raises(ValueError, match="stride=0"):
        Llavolta(stride=0)
