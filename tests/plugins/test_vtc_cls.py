"""VTC-CLS keeps what the official code keeps, on stored attention and on a real vision tower."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce.reducer import Geometry, Step, TokenReducer
from tokenreduce.signals import EncoderAttention
from tokenreduce_plugins.vtc_cls import VtcCls

from .clip import assert_equal_states, encode
from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored


def kept(reducer: TokenReducer, attention: Tensor, patches: Tensor) -> list[int]:
    """The choice, given attention ``(layers, heads, rows, 1 + patches)`` of every layer."""
    geometry = replace(GEOMETRY, encoder_layers=len(attention), feature_layer=len(attention) - 2)
    (step,) = reducer.steps(geometry)
    signals: dict[Hashable, Any] = {
        EncoderAttention(layer): stored(rows, slice(1, None), class_token=0) for layer, rows in enumerate(attention)
    }
    return show(reducer, step, patches, signals, geometry=geometry).index.tolist()


@pytest.mark.parametrize("case", cases("vtc_cls"))
def test_official_vectors(case: Case) -> None:
    attention, hidden = case.given["attn"], case.given["hidden"]
    reducer = VtcCls(case.settings["k"], start=case.settings["start_layer"])
    places = kept(reducer, attention, hidden[1:])
    assert places == case.expected["kept"].tolist()
    assert_equal_floats(hidden[1:][places], case.expected["features"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", cases("e2e_vtc_cls"))
def test_official_vectors_on_a_real_tower(case: Case, attention: str) -> None:
    reducer = VtcCls(case.settings["k"], start=case.settings["start_layer"])
    done = encode(reducer, case.given["pixel_values"], attention)
    assert list(done.images[0].kept) == case.expected["kept"].tolist()
    assert_equal_states(done.features[0], case.expected["features"])


class LastLayerToo(VtcCls):
    """The mistake of counting the last layer in."""

    def steps(self, geometry: Geometry) -> list[Step]:
        (step,) = super().steps(geometry)
        return [replace(step, sees=(*step.sees, EncoderAttention(geometry.encoder_layers - 1)))]


@pytest.mark.parametrize("mistake", [VtcCls(9, start=19), VtcCls(9, start=21), LastLayerToo(9, start=20)], ids=str)
def test_other_layers_keep_others(mistake: TokenReducer) -> None:
    (case,) = cases("e2e_vtc_cls")[0].values
    assert isinstance(case, Case)
    assert list(encode(mistake, case.given["pixel_values"]).images[0].kept) != case.expected["kept"].tolist()


@pytest.mark.parametrize(("keep", "expected"), [(3, [1, 4, 7]), (4, [1, 2, 4, 7])])
def test_worked_example(keep: int, expected: list[int]) -> None:
    rows = torch.tensor(
        [
            [0.10, 0.05, 0.20, 0.05, 0.10, 0.10, 0.05, 0.15, 0.10],
            [0.05, 0.20, 0.10, 0.05, 0.15, 0.05, 0.05, 0.20, 0.05],
            [0.02, 0.25, 0.05, 0.03, 0.20, 0.05, 0.10, 0.10, 0.10],
        ]
    )
    attention = torch.rand(24, 2, 1, 10, generator=torch.Generator().manual_seed(0))
    attention[20:23, :, 0, 1:] = rows[:, None]
    assert kept(VtcCls(keep), attention, torch.zeros(9, 2)) == expected


def test_without_a_class_token_attention_received_decides() -> None:
    geometry = replace(GEOMETRY, encoder_layers=3, feature_layer=1, class_token=False)
    layers = random(2, 4, 9, 9).softmax(dim=-1)
    reducer = VtcCls(3, start=0)
    (step,) = reducer.steps(geometry)
    signals: dict[Hashable, Any] = {
        EncoderAttention(layer): stored(layers[layer], slice(0, None)) for layer in range(2)
    }
    received = layers.mean(dim=1).sum(dim=(0, 1))
    selection = show(reducer, step, torch.zeros(9, 2), signals, geometry=geometry)
    assert selection.index.tolist() == sorted(received.topk(3).indices.tolist())


def test_the_last_layer_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="start=-1 is the last of 24 encoder layers"):
        VtcCls(start=-1).steps(GEOMETRY)
