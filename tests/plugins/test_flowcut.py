"""FlowCut scores, counts and keeps what the official code does, on stored tensors and inside a real vision tower."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokenreduce.reducer import AtEncoder, Selection, Span, Step, VisualTokens, best
from tokenreduce.signals import Attention
from tokenreduce_plugins import flowcut
from tokenreduce_plugins.flowcut import FlowCut

from .clip import assert_equal_states, encode
from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, walk


@pytest.mark.parametrize("case", cases("flowcut_functions"))
def test_official_vectors(case: Case) -> None:
    counts = []
    for sample in range(case.settings["B"]):
        looked_at, likeness, values = (case.given[name][sample] for name in ("attn", "semantic", "value"))
        assert_equal_floats(flowcut.score(looked_at, likeness, values), case.expected["score"][sample])
        counts.append(flowcut.pruned(looked_at, case.settings["rpl"], case.settings["target_patches"]))
    assert max(counts) == case.expected["n_prune"].item()


@dataclass(frozen=True)
class Told(FlowCut):
    """FlowCut that is told how many patches every layer leaves: the official counts of a batch."""

    leaves: tuple[int, ...] = ()

    def count(self, step: Step, span: Span) -> int | None:
        assert isinstance(step, AtEncoder) and isinstance(step.layer, int)
        return self.leaves[step.layer]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        selection = super().select(step, tokens)
        if len(selection.index) == tokens.keep or tokens.keep == len(tokens):
            return selection
        _, flow = self.flow(tokens[step.sees[0]])
        total = 0.5 * tokens.carried + 0.5 * flow
        kept = best(total, tokens.keep)
        return Selection(kept, carry=total[kept])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", cases("e2e_flowcut"))
def test_official_vectors_inside_a_real_tower(case: Case, attention: str) -> None:
    lengths = (case.expected["layer_input_lengths"] - 1).tolist()
    reducer: FlowCut = FlowCut(case.settings["target_num"])
    if case.settings["B"] > 1:  # the official code cuts all pictures of a batch to the count of the shortest one
        reducer = Told(case.settings["target_num"], leaves=tuple(lengths[1:]))
    done = encode(reducer, case.given["pixel_values"], attention)
    for sample, image in enumerate(done.images):
        assert list(image.kept) == case.expected["kept"][sample].tolist()
        assert [len(step.index) for step in image.steps] == lengths[1:23]
        assert_equal_states(done.features[sample], case.expected["features"][sample])


class Forgetful(FlowCut):
    """The mistake of not accumulating over the layers."""

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        tokens.carried = None
        return super().select(step, tokens)


class EveryLayer(FlowCut):
    """The mistake of another parity."""

    def steps(self, geometry: Any) -> list[Step]:
        return super().steps(replace(geometry, feature_layer=geometry.feature_layer - 1))


@pytest.mark.parametrize("mistake", [Forgetful, EveryLayer])
def test_a_mistake_keeps_others(mistake: type[FlowCut]) -> None:
    (case,) = cases("e2e_flowcut")[0].values
    assert isinstance(case, Case)
    done = encode(mistake(case.settings["target_num"]), case.given["pixel_values"])
    assert list(done.images[0].kept) != case.expected["kept"][0].tolist()


def encoder_view(step: Step, patches: int, class_token: bool) -> Attention:
    """A random attention layer, another one for every step."""
    assert isinstance(step, AtEncoder) and isinstance(step.layer, int)
    length = patches + class_token
    queries, keys, values = (random(4, length, 8, seed=3 * step.layer + part) for part in range(3))
    queries = queries + 2  # or the mean query would look at all patches alike
    return Attention(
        queries, keys, values, 8**-0.5, visual=slice(int(class_token), None), class_token=0 if class_token else None
    )


@pytest.mark.parametrize("class_token", [True, False])
def test_the_target_is_reached_step_by_step(class_token: bool) -> None:
    def signals(step: Step, patches: Tensor) -> dict[Hashable, Any]:
        return {step.sees[0]: encoder_view(step, len(patches), class_token)}

    done = walk(FlowCut(keep=30), replace(GEOMETRY, class_token=class_token), random(144, 4), signals)
    assert len(done.counts) == 22
    assert done.counts[-1] == 30
    assert done.counts[0] == 144  # 21 layers remain after the first: an odd number
    assert done.counts == sorted(done.counts, reverse=True)
    assert len(set(done.counts)) > 3
    assert all(done.counts[layer] == done.counts[layer - 1] for layer in range(2, 22, 2))
    assert done.index.tolist() == sorted(done.index.tolist())


def test_scores_accumulate_over_the_layers_that_are_passed() -> None:
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


def test_worked_example() -> None:
    looked_at = torch.tensor([[0.30, 0.05, 0.20, 0.05, 0.25, 0.15], [0.60, 0.02, 0.18, 0.05, 0.10, 0.05]])
    likeness = torch.tensor([[0.10, 0.20, 0.20, 0.10, 0.30, 0.10], [0.2, 0.2, 0.2, 0.1, 0.2, 0.1]])
    values = torch.tensor([[2.0, 1, 1, 1, 1, 2], [1.0, 1, 1, 1, 1, 1]])
    flows = [flowcut.score(*layer) for layer in zip(looked_at, likeness, values[..., None], strict=True)]
    assert_close(flows[0], torch.tensor([0.80, 0.25, 0.40, 0.15, 0.55, 0.50]))
    total = 0.5 * flows[0] + 0.5 * flows[1]
    assert_close(total, torch.tensor([0.80, 0.235, 0.39, 0.15, 0.425, 0.325]))
    assert flowcut.pruned(looked_at[1], remaining=4, target=2) == 1
    assert best(total, 5).tolist() == [0, 1, 2, 4, 5]


def test_features_of_the_first_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="which is the first here"):
        FlowCut().steps(replace(GEOMETRY, feature_layer=0))
