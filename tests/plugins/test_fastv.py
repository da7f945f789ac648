"""FastV gives what the official code gave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenreduce.attach.bare import reduce_decoder_tokens
from tokenreduce.reducer import Grid, Selection, Span, Step, Tile, VisualTokens, best
from tokenreduce_plugins.fastv import FastV

from .decoder import UNREDUCED, assert_official, language_model, last_logit_change, run
from .golden import GEOMETRY, Case, cases, random, show, stored


def kept(reducer: FastV, attention: Tensor, prefix: int, count: int) -> Tensor:
    """What stays by attention ``(heads, rows, sequence)``, of which row -1 is the prompt's last token."""
    (step,) = reducer.steps(GEOMETRY)
    view = stored(attention, slice(prefix, prefix + count))
    return show(reducer, step, random(count, 4), {step.sees[0]: view}).index


def reducer_of(case: Case, **others: object) -> FastV:
    return FastV(**{"keep": 1 - case.settings["R"], "layer": case.settings["K"], **others})


@pytest.mark.parametrize("case", cases("fastv"))
def test_official_selection(case: Case) -> None:
    prefix, count = case.settings["prefix"], case.settings["N"]
    assert kept(reducer_of(case), case.given["attn"], prefix, count).equal(case.expected["kept_image"])


@pytest.mark.parametrize("case", cases("e2e_fastv"))
def test_official_model(case: Case) -> None:
    found = run(case, reducer_of(case))
    assert found.index[0].equal(case.expected["kept_image"])
    assert_official(case, found)


@pytest.mark.parametrize("case", cases("e2e_fastv"))
def test_official_model_without_a_cache(case: Case) -> None:
    """Without a key-value cache every new token is a prefill of its own, so that it ranks again."""
    model, sequence = language_model(case.about["model"]), case.given["inputs_embeds"]
    with reduce_decoder_tokens(model, reducer_of(case), [tuple(case.about["image_span"])]) as prefills, torch.no_grad():
        for step, expected in enumerate(case.expected["nocache_token_logits"]):
            logits = model(inputs_embeds=sequence, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0.0)
            token = case.expected["nocache_tokens"][step]
            assert logits.argmax() == token
            sequence = torch.cat([sequence, model.get_input_embeddings()(token)[None, None]], dim=1)
    kept_by_step = torch.tensor([prefill.strands[0].journey.tracks[0].steps[0].index for prefill in prefills])
    assert kept_by_step.equal(case.expected["nocache_kept_image"])


class LoudestHead(FastV):
    """The mistake of taking the largest of the heads in place of their mean."""

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        attention = tokens[step.sees[0]]
        return Selection(best(attention.rows(-1)[:, 0, attention.visual].amax(dim=0), tokens.keep))


@pytest.mark.parametrize("case", cases("e2e_fastv"))
def test_mistakes_are_noticed(case: Case) -> None:
    sensitivity = case.about["sensitivity"]
    official = set(case.expected["kept_image"].tolist())

    def changed(reducer: FastV) -> int:
        return len(official - set(run(case, reducer).index[0].tolist()))

    compacted = run(case, reducer_of(case, positions="compact"))
    assert compacted.index[0].equal(case.expected["kept_image"])
    assert last_logit_change(case, compacted) == pytest.approx(
        sensitivity["last_token_logit_change_if_positions_were_compacted"], abs=1e-4
    )
    assert (
        changed(reducer_of(case, layer=case.settings["K"] + 1))
        == sensitivity["kept_tokens_changed_if_ranked_by_layer_K"]
    )
    unreduced = last_logit_change(case, run(case, UNREDUCED))
    assert unreduced == pytest.approx(sensitivity["last_token_logit_change_without_reduction"], abs=1e-4)
    loudest = LoudestHead(keep=1 - case.settings["R"], layer=case.settings["K"])
    assert changed(loudest) == sensitivity["kept_tokens_changed_if_head_max_instead_of_mean"]
    everyone = sensitivity["kept_tokens_changed_if_ranked_by_mean_over_all_queries"]
    assert everyone and changed(reducer_of(case, queries="all")) == everyone


def test_worked_example() -> None:
    scores = torch.tensor([0.01, 0.09, 0.03, 0.02, 0.08, 0.04, 0.07, 0.05, 0.06])
    attention = torch.zeros(1, 14, 14)
    attention[0, -1, 2:11] = scores
    attention[0, :-1, 2:11] = scores.flip(0)
    assert kept(FastV(keep=1 - 5 / 9), attention, 2, 9).tolist() == [1, 4, 6, 8]
    assert kept(FastV(keep=4, queries="all"), attention, 2, 9).tolist() == [0, 2, 4, 7]


@pytest.mark.parametrize(
    ("entered", "keep", "count"), [(9, 0.5, 4), (7, 0.5, 4), (576, 0.5, 288), (3, 0.1, 1), (9, 5, 5)]
)
def test_counts_are_rounded_half_to_even(entered: int, keep: float, count: int) -> None:
    reducer = FastV(keep=keep)
    (step,) = reducer.steps(GEOMETRY)
    assert reducer.count(step, Span(GEOMETRY, (Tile(Grid(1, entered)),), entered, entered)) == count


def test_published_layers_rank_before_they_cut() -> None:
    (step,) = FastV().steps(GEOMETRY)
    assert (step.layer, step.sees[0].layer) == (2, 1)
    (step,) = FastV(layer=2 / 32).steps(GEOMETRY)
    assert step.sees[0].layer == 1
