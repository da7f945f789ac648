"""V2Drop keeps what the official code keeps, where that keeps it, on layers that give stored states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tokenreduce.attach.bare import reduce_decoder_tokens
from tokenreduce_plugins.v2drop import V2Drop

from .golden import GEOMETRY, Case, assert_equal_floats, cases


@dataclass
class Run:
    """What every layer was given: ``positions`` (n,) of its tokens; and ``last``, the states behind the last one."""

    positions: list[Tensor]
    last: Tensor


def run(reducer: V2Drop, hidden: Tensor, span: tuple[int, int]) -> Run:
    """Give a language model layers that return the states ``hidden`` (layers + 1, sequence, dim) of the tokens that
    they are given, by their position ids."""
    config = LlamaConfig(
        hidden_size=hidden.shape[-1],
        intermediate_size=8,
        num_hidden_layers=len(hidden) - 1,
        num_attention_heads=1,
        head_dim=2,
        vocab_size=8,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    found = Run([], hidden)

    def layer(number: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *, position_ids: Tensor, **_: Any) -> Tensor:
            found.positions.append(position_ids[0])
            found.last = hidden[number + 1, position_ids[0]]
            return found.last[None]

        return forward

    for number, each in enumerate(model.model.layers):
        each.forward = layer(number)
    with torch.no_grad(), reduce_decoder_tokens(model, reducer, [span]):
        model(inputs_embeds=hidden[:1], use_cache=False)
    return found


def reducer_of(case: Case, **others: Any) -> V2Drop:
    knobs = {"layers": tuple(case.settings["drop_layers"]), "ratios": tuple(map(float, case.settings["keep_ratios"]))}
    return V2Drop(**{**knobs, **others})


def run_case(case: Case, reducer: V2Drop) -> Run:
    start = case.settings["visual_start"]
    return run(reducer, case.given["hidden"], (start, start + case.settings["visual_tokens"]))


def agrees(case: Case, found: Run) -> bool:
    """Whether every layer was given what the official one was."""
    stages = enumerate(case.settings["drop_layers"])
    return all(found.positions[layer].equal(case.expected[f"positions_{stage}"]) for stage, layer in stages)


@pytest.mark.parametrize("case", cases("v2drop"))
def test_official_vectors(case: Case) -> None:
    found, start = run_case(case, reducer_of(case)), case.settings["visual_start"]
    assert [len(each) for each in found.positions] == case.settings["sequence_per_layer"]
    assert agrees(case, found)
    for stage, layer in enumerate(case.settings["drop_layers"]):
        visual = found.positions[layer] - start
        visual = visual[(visual >= 0) & (visual < case.settings["visual_tokens"])]
        assert visual.equal(case.expected[f"kept_{stage}"])
    assert_equal_floats(found.last, case.expected["last_hidden"])


Change = Callable[[list[Tensor], int, int], Tensor]
"""How much tokens changed, from their states at the input of every layer ``(n, dim)``, the layer of the drop, and that
of the drop before."""

MISTAKES: dict[str, tuple[Change | None, Callable[[int, float, int], int] | None]] = {
    "lowest variation kept": (lambda at, layer, _: -(at[layer] - at[layer - 1]).norm(dim=-1), None),
    "cosine instead of L2": (lambda at, layer, _: -torch.cosine_similarity(at[layer], at[layer - 1], dim=-1), None),
    "L1 instead of L2": (lambda at, layer, _: (at[layer] - at[layer - 1]).norm(p=1, dim=-1), None),
    "maximum norm instead of L2": (lambda at, layer, _: (at[layer] - at[layer - 1]).abs().amax(dim=-1), None),
    "relative change": (
        lambda at, layer, _: (at[layer] - at[layer - 1]).norm(dim=-1) / at[layer - 1].norm(dim=-1),
        None,
    ),
    "difference of norms": (lambda at, layer, _: (at[layer].norm(dim=-1) - at[layer - 1].norm(dim=-1)).abs(), None),
    "change made by the target layer itself (one layer late)": (
        lambda at, layer, _: (at[layer + 1] - at[layer]).norm(dim=-1),
        None,
    ),
    "change since the embeddings": (lambda at, layer, _: (at[layer] - at[0]).norm(dim=-1), None),
    "change since the last drop": (lambda at, layer, last: (at[layer] - at[last]).norm(dim=-1), None),
    "change over two layers": (lambda at, layer, _: (at[layer] - at[max(0, layer - 2)]).norm(dim=-1), None),
    "ratio of the original count": (None, lambda left, ratio, whole: max(1, min(left, int(whole * ratio)))),
    "count rounded": (None, lambda left, ratio, whole: max(1, round(left * ratio))),
    "count ceiled": (None, lambda left, ratio, whole: max(1, -int(-left * ratio // 1))),
    "ratio 0 drops the last token too": (None, lambda left, ratio, whole: int(left * ratio)),
    "ratio read as dropped fraction": (None, lambda left, ratio, whole: max(1, left - int(left * ratio))),
}


def by_loop(
    case: Case, change: Change | None = None, count: Callable[[int, float, int], int] | None = None
) -> list[Tensor]:
    """What every drop leaves of the visual tokens, in a plain loop, perhaps with a mistake."""
    start, whole = case.settings["visual_start"], case.settings["visual_tokens"]
    visual = case.given["hidden"][:, start : start + whole]
    change = change or (lambda at, layer, _: (at[layer] - at[layer - 1]).norm(dim=-1))
    count = count or (lambda left, ratio, whole: max(1, int(left * ratio)))
    left, last, kept = torch.arange(whole), 0, []
    for layer, ratio in zip(case.settings["drop_layers"], case.settings["keep_ratios"], strict=True):
        scores = change([states[left] for states in visual], layer, last)
        left, last = left[scores.topk(count(len(left), ratio, whole)).indices.sort().values], layer
        kept.append(left)
    return kept


@pytest.mark.parametrize("case", cases("v2drop"))
def test_mistakes_are_noticed(case: Case) -> None:
    expected = [case.expected[f"kept_{stage}"] for stage in range(3)]
    same = [each.equal(own) for each, own in zip(by_loop(case), expected, strict=True)]
    assert all(same), "the loop without a mistake gives the official selection"
    seen = {
        name
        for name, mistake in MISTAKES.items()
        if any(not each.equal(own) for each, own in zip(by_loop(case, *mistake), expected, strict=True))
    }
    if not agrees(case, run_case(case, reducer_of(case, positions="compact"))):
        seen.add("positions compacted")
    late = tuple(layer + 1 for layer in case.settings["drop_layers"])
    if not agrees(case, run_case(case, reducer_of(case, layers=late))):
        seen.add("drop applied one layer late")
    assert seen == set(case.about["detects"])


def test_worked_example() -> None:
    """One token of text, five visual ones, one of text; layers 1, 2 and 3 leave 0.6, 0.5 and 0 of what is there."""
    changes = torch.tensor([[0.14, 0.50, 0.20, 0.45, 0.10], [0.40, 0.10, 0.28, 0.30, 0.60], [0.1, 0.2, 0.3, 0.4, 0.5]])
    hidden = torch.zeros(5, 7, 2)
    hidden[1:4, 1:6, 0] = changes.cumsum(0)
    hidden[4] = hidden[3]
    found = run(V2Drop(layers=(1, 2, 3), ratios=(0.6, 0.5, 0.0)), hidden, (1, 6))
    assert [each.tolist() for each in found.positions] == [[0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 6], [0, 4, 6], [0, 4, 6]]


def test_published_settings() -> None:
    def layers(reducer: V2Drop) -> list[tuple[int | None, int]]:
        return [(step.decoder_layer(GEOMETRY), step.stage) for step in reducer.steps(GEOMETRY)]

    assert layers(V2Drop()) == [(2, -1), (3, 0), (16, -1), (17, 1), (21, -1), (22, 2)]
    assert layers(V2Drop(layers=(1, 2, 9))) == [(1, 0), (2, 1), (8, -1), (9, 2)], "what a drop leaves is looked at too"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"layers": (3,)}, "give one ratio for every layer"),
        ({"ratios": (0.5, 1.5, 0.0)}, "give numbers from 0 to 1"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        V2Drop(**knobs)


def test_layers_that_fall_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are layers \[3, 3, 22\] of 32: give layers that ascend"):
        V2Drop(layers=(3, 0.1, 22)).steps(GEOMETRY)


def test_a_ratio_is_the_largest_share() -> None:
    assert V2Drop(ratios=(0.5, 0.25, 0.0)).with_keep(0.8).ratios == (0.8, 0.4, 0.0)
    with pytest.raises(TypeError, match="give a ratio"):
        V2Drop().with_keep(64)
