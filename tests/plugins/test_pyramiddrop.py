"""PyramidDrop gives what the official code gave."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenreduce import create
from tokenreduce.counts import Layout, layer_counts
from tokenreduce.reducer import Grid, Selection, Step, Tile, VisualTokens
from tokenreduce.signals import Attention, LookAheadAttention
from tokenreduce_plugins.pyramiddrop import PyramidDrop

from .decoder import UNREDUCED, assert_official, last_logit_change, run
from .golden import GEOMETRY, Case, cases, random, walk


def rotate(states: Tensor, theta: float) -> Tensor:
    """Rotary embedding of ``(heads, sequence, head_dim)`` at positions 0, 1, 2 ..."""
    length, width = states.shape[-2:]
    frequencies = theta ** -(torch.arange(0, width, 2) / width)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
    half = torch.cat([-states[..., width // 2 :], states[..., : width // 2]], dim=-1)
    return states * angles.cos() + half * angles.sin()


@pytest.mark.parametrize("case", cases("pyramiddrop"))
def test_official_selection(case: Case) -> None:
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
        visual_places, scale = slice(prefix, prefix + len(visual)), case.settings["head_dim"] ** -0.5
        return {LookAheadAttention(): Attention(queries, keys, keys, scale, visual=visual_places, causal=True)}

    ratios = case.settings["ratios"]
    for stages in range(1, len(ratios) + 1):
        reducer = PyramidDrop(layers=tuple(range(8, 8 + stages)), ratios=tuple(ratios[:stages]))
        kept = walk(reducer, GEOMETRY, states[prefix : prefix + count], look_ahead).index
        assert kept.equal(case.expected[f"kept_image_stage{stages - 1}"])


def reducer_of(case: Case, **others: Any) -> PyramidDrop:
    knobs = {"layers": tuple(case.settings["layer_list"]), "ratios": tuple(case.settings["ratios"])}
    return PyramidDrop(**{**knobs, **others})


@pytest.mark.parametrize("case", cases("e2e_pyramiddrop"))
def test_official_model(case: Case) -> None:
    found = run(case, reducer_of(case))
    assert [len(index) for index in found.index] == case.about["stage_counts"]
    for stage, index in enumerate(found.index):
        assert index.equal(case.expected[f"kept_image_stage{stage}"])
    assert_official(case, found)


@dataclass(frozen=True)
class Replayed(PyramidDrop):
    """Makes the recorded cuts, whatever the attention: kept positions alone would also move what later stages see."""

    cuts: tuple[Any, ...] = ()

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        (cut,) = (cut for cut in self.cuts if len(cut) == tokens.keep)
        return Selection(torch.isin(tokens.index, cut).nonzero()[:, 0])


@pytest.mark.parametrize("case", cases("e2e_pyramiddrop"))
def test_mistakes_are_noticed(case: Case) -> None:
    sensitivity = case.about["sensitivity"]
    (layer, *_), (ratio, *_) = case.settings["layer_list"], case.settings["ratios"]
    paper = run(case, reducer_of(case, layers=(layer,), ratios=(ratio,), ranks="last")).index[0]
    changed = set(case.expected["kept_image_stage0"].tolist()) - set(paper.tolist())
    assert len(changed) == sensitivity["stage0_tokens_changed_if_ranked_by_the_stage_s_own_last_layer"] > 0

    recorded = [case.expected[f"kept_image_stage{stage}"] for stage in range(len(case.about["stage_counts"]))]
    replayed = Replayed(cuts=tuple(recorded), **reducer_of(case, positions="original").knobs())
    change = last_logit_change(case, run(case, replayed))
    assert change == pytest.approx(sensitivity["last_token_logit_change_if_positions_were_kept"], abs=1e-4)
    change = last_logit_change(case, run(case, UNREDUCED))
    assert change == pytest.approx(sensitivity["last_token_logit_change_without_reduction"], abs=1e-4)


def test_worked_example() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.8, 0.4, 0.7, 0.5, 0.6])[:, None]

    def look_ahead(step: Step, visual: Tensor) -> dict[Hashable, Any]:
        keys = torch.cat([torch.zeros(2, 1), visual, torch.zeros(3, 1)])[None]
        return {LookAheadAttention(): Attention(torch.ones_like(keys), keys, keys, 1.0, slice(2, 2 + len(visual)))}

    for stages, expected in ((1, [1, 4, 6, 8]), (2, [1, 4]), (3, [1])):
        reducer = PyramidDrop(layers=(8, 16, 24)[:stages], ratios=(0.5, 0.25, 0.125)[:stages])
        assert walk(reducer, GEOMETRY, scores, look_ahead).index.tolist() == expected


def test_published_counts() -> None:
    def look_ahead(step: Step, visual: Tensor) -> dict[Hashable, Any]:
        keys = random(2, 35 + len(visual) + 5, 8)
        return {LookAheadAttention(): Attention(keys, keys, keys, 1.0, slice(35, 35 + len(visual)), causal=True)}

    done = walk(PyramidDrop(), GEOMETRY, random(576, 4), look_ahead)
    assert done.counts == [288, 144, 72]
    assert [step.layer for step in PyramidDrop(layers=(8, 16, 24)).steps(GEOMETRY)] == [8, 16, 24]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"layers": (8,)}, "give one ratio for every layer"),
        ({"ratios": (0.5, 0.6, 0.1)}, "cannot grow"),
        ({"ratios": (0.5, 0.2, 0.0)}, "keep=0.0"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidDrop(**knobs)


@pytest.mark.parametrize(
    ("preset", "counts", "mean"),
    [
        ("script", [460, 288, 144], 0.6375),
        ("qa", [460, 345, 230], 0.7),
        ("class", [288, 144, 72], 0.46875),
        ("ate", [518, 460, 432, 403, 345, 316, 288, 259, 230, 144], 0.6625),
    ],
)
def test_schedules_of_adatoken_3d(preset: str, counts: list[int], mean: float) -> None:
    per_layer = layer_counts(create(f"adatoken_3d_{preset}"), GEOMETRY, Layout((Tile(Grid(24, 24)),)))
    assert list(dict.fromkeys(per_layer)) == [576, *counts]
    assert sum(per_layer) / (32 * 576) == pytest.approx(mean, abs=1e-3)
