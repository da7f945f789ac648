"""SparseVLM gives what the official code gave."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenreduce_plugins.sparsevlm as sparsevlm
from tokenreduce.reducer import Step
from tokenreduce.signals import ProjectedFeatures, TextEmbeddings
from tokenreduce_plugins.sparsevlm import SparseVlm, cluster_and_merge, telling

from .decoder import Run, assert_official, last_logit_change, run
from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored, walk

LISTS = {
    192: ((300, 200, 110), (309, 204, 113), 206.5),
    128: ((303, 110, 36), (312, 117, 39), 145.4),
    96: ((238, 48, 26), (249, 55, 27), 114.1),
    64: ((66, 30, 17), (82, 32, 18), 82.3),
}
"""The published lists, the counts that they leave with merged tokens, and the mean over layer inputs."""


@pytest.mark.parametrize("case", cases("sparsevlm_topk"))
def test_official_selection(case: Case) -> None:
    prefix, count = case.settings["prefix"], case.settings["N"]
    reducer = SparseVlm(layers=(2, 6, 15), keeps=tuple(case.settings["keep_list"]))
    step = reducer.steps(GEOMETRY)[(2, 6, 15).index(case.settings["layer"])]
    text = torch.arange(prefix + count, prefix + count + case.settings["text"])
    view = stored(case.given["attn"], slice(prefix, prefix + count), text=text)
    words = case.given["raters"].nonzero()[:, 0]

    selection = show(reducer, step, random(count, 4), {step.sees[0]: view}, carried=words)
    kept = selection.index[: len(case.expected["kept"])]
    assert kept.equal(case.expected["kept"])
    assert_equal_floats(view.mean(text[words]).mean(dim=0), case.expected["score"])
    pruned = count - len(kept)
    assert (selection.sources(count) >= len(kept)).sum() == int(0.3 * pruned) + 1
    assert selection.carry.equal(words)


@pytest.mark.parametrize("case", cases("sparsevlm_merge"))
def test_official_merging(case: Case) -> None:
    centres, cluster, merged = cluster_and_merge(case.given["x"], case.settings["clusters"])
    assert_equal_floats(merged, case.expected["merged"])
    assert cluster[centres].tolist() == list(range(case.settings["clusters"]))


def reducer_of(case: Case, **others: Any) -> SparseVlm:
    return SparseVlm(**{"layers": (2, 6), "keeps": tuple(case.settings["keep_list"]), **others})


def kept_of(case: Case, found: Run) -> list[Tensor]:
    """What every stage keeps, without merged tokens, as places among the visual tokens before that stage."""
    first, second = case.settings["keep_list"]
    before = {int(token): place for place, token in enumerate(found.index[0])}
    return [found.index[0][:first], torch.tensor([before[int(token)] for token in found.index[1][:second]])]


@pytest.mark.parametrize("case", cases("e2e_sparsevlm"))
def test_official_model(case: Case) -> None:
    found = run(case, reducer_of(case), watched=[3])
    for stage, kept in enumerate(kept_of(case, found)):
        assert kept.equal(case.expected[f"kept_stage{stage}"])
    assert_equal_floats(found.entering[3], case.expected["hidden_after_layer2"])
    assert_official(case, found)


@pytest.mark.parametrize("case", cases("e2e_sparsevlm"))
def test_official_raters(case: Case) -> None:
    (start, end), embeddings = case.about["image_span"], case.given["inputs_embeds"][0]
    assert telling(embeddings[start:end], embeddings[end:]).equal(case.expected["raters"].long())


@pytest.mark.parametrize("case", cases("e2e_sparsevlm"))
def test_mistakes_are_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_logit_change(case, run(case, reducer_of(case, positions="original"))) > 1e-2
    wrong_layer = run(case, reducer_of(case, layers=(3, 6)))
    assert not kept_of(case, wrong_layer)[0].equal(case.expected["kept_stage0"])
    monkeypatch.setattr(sparsevlm, "telling", lambda visual, text: torch.arange(len(text)))
    assert not kept_of(case, run(case, reducer_of(case)))[0].equal(case.expected["kept_stage0"])


def test_worked_example() -> None:
    rows = torch.zeros(1, 14, 14)
    first = torch.tensor([0.01, 0.09, 0.03, 0.02, 0.08, 0.04, 0.07, 0.05, 0.06])
    rows[0, 11, 2:11], rows[0, 13, 2:11] = first, first.flip(0) / 2
    for keep, expected in ((4, [1, 4, 6, 7]), (3, [1, 4, 7]), (2, [1, 4])):
        reducer = SparseVlm(layers=(2,), keeps=(keep,))
        (step,) = reducer.steps(GEOMETRY)
        view = stored(rows, slice(2, 11), text=torch.arange(11, 14))
        selection = show(reducer, step, random(9, 4), {step.sees[0]: view}, carried=torch.tensor([0, 2]))
        assert selection.index[:keep].tolist() == expected
        if keep == 4:  # of five pruned tokens two are recycled, into one
            assert len(selection.index) == 5
            assert (selection.sources(9) == 4).nonzero()[:, 0].tolist() == [2, 8]


@pytest.mark.parametrize("budget", LISTS)
def test_published_counts(budget: int) -> None:
    def attention(step: Step, visual: Tensor) -> dict[Hashable, Any]:
        behind = 35 + len(visual)
        rows = random(2, behind + 10, behind + 10).softmax(dim=-1)
        view = stored(rows, slice(35, behind), text=torch.arange(behind, behind + 10))
        return {step.sees[0]: view, ProjectedFeatures(): projected, TextEmbeddings(): random(10, 4, seed=1)}

    projected = random(576, 4)
    keeps, counts, mean = LISTS[budget]
    done = walk(SparseVlm(keeps=keeps), GEOMETRY, projected, attention)
    assert tuple(done.counts) == counts
    first, second, third = counts
    assert (3 * 576 + 4 * first + 9 * second + 16 * third) / 32 == pytest.approx(mean, abs=0.05)
    if budget == 192:
        assert walk(SparseVlm(), GEOMETRY, projected, attention).counts == done.counts


def test_raters_are_the_words_above_the_mean() -> None:
    visual, text = torch.eye(3), torch.tensor([[5.0, 5, 5], [0, 0, 0], [1, 1, 1], [5, 5, 5]])
    assert telling(visual, text).tolist() == [0, 3]


def test_a_single_word_rates_alone() -> None:
    assert telling(torch.eye(3), torch.ones(1, 3)).tolist() == [0]


def test_a_list_that_does_not_fit_the_layers_is_refused() -> None:
    for keeps in ((300,), (300, 0.5, 0.1)):
        with pytest.raises(ValueError, match="give every layer one ratio, or one number"):
            SparseVlm(keeps=keeps)
    with pytest.raises(ValueError, match="keep=0 is not"):
        SparseVlm(keeps=(300, 200, 0))


def specified(points: Tensor, clusters: int) -> tuple[list[int], list[int], Tensor]:
    """The rule as it is written down, token by token: centres, every token's cluster, and the clusters' means."""
    tokens = range(len(points))
    between = torch.stack([torch.stack([(one - other).norm() for other in points]) for one in points])
    between = between / points.shape[1] ** 0.5
    density = torch.stack([(-(row.sort().values[:clusters] ** 2).mean()).exp() for row in between])
    denser = [[int(other) for other in tokens if density[other] > density[token]] for token in tokens]
    apart = torch.stack([between[token, near].min() if near else between.max() for token, near in enumerate(denser)])
    centres = (density * apart).topk(clusters).indices.tolist()
    nearest = [min(range(clusters), key=lambda place: float(between[centres[place], token])) for token in tokens]
    cluster = [centres.index(token) if token in centres else nearest[token] for token in tokens]
    members = [[token for token in tokens if cluster[token] == place] for place in range(clusters)]
    return centres, cluster, torch.stack([points[own].sum(0) / (len(own) + 1e-6) for own in members])


PAIRS = torch.tensor([[0.0, 0], [9, 0], [1, 0], [10, 0], [30, 30]])
"""Two pairs of tokens that are each other's nearest, equally close, and one token far away."""


def tied(seed: int, count: int) -> Tensor:
    """Random tokens, some of them equal, and some on a coarse grid, where many distances are equal."""
    points = random(count, 8, seed=seed)
    points[count // 2 :] = points[count // 2 :].round()
    points[-1] = points[0]
    return points


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "points",
    [PAIRS, PAIRS.flip(0), torch.zeros(7, 3), torch.eye(6), *(tied(seed, 5 + 4 * seed) for seed in range(8))],
    ids=lambda points: f"{len(points)}",
)
def test_ties_between_clusters_are_those_of_topk_on_a_cpu(points: Tensor, clusters: int) -> None:
    centres, cluster, merged = cluster_and_merge(points, clusters)
    expected = specified(points, clusters)
    assert (centres.tolist(), cluster.tolist()) == expected[:2]
    assert_equal_floats(merged, expected[2])


@pytest.mark.parametrize("seed", range(10))
def test_two_recycled_tokens_that_are_each_others_nearest(seed: int) -> None:
    """The two densest of all: a close pair among tokens that are far from each other."""
    points = 10 * random(12, 16, seed=seed)
    points[seed] = points[11] + 0.01 * random(16, seed=seed)
    centres, cluster, merged = cluster_and_merge(points, 2)
    expected = specified(points, 2)
    assert {seed, 11} == set(expected[0])
    assert (centres.tolist(), cluster.tolist()) == expected[:2]
    assert_equal_floats(merged, expected[2])
