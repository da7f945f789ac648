"""PruneSID keeps what the official code keeps, and shares its budget as that does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.signals import ClassToken, EncoderAttention
from tokenreduce_plugins.prunesid import PruneSid, limit, loadings, quotas, survivors

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored


def kept(attention: Tensor, hidden: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """On attention ``(heads, rows, sequence)``: places in the sequence with the class token, and features."""
    reducer = PruneSid(count, seed=seed)
    (step,) = reducer.steps(GEOMETRY)
    view = stored(attention, slice(1, None), class_token=0)
    selection = show(reducer, step, hidden[1:], {EncoderAttention(-2): view, ClassToken(): hidden[0]})
    assert selection.features is not None
    return selection.index + 1, selection.features


@pytest.mark.parametrize("case", cases("prunesid"))
@pytest.mark.parametrize("seed", [0, 1])
def test_official_vectors(case: Case, seed: int) -> None:
    count = case.settings["need_token_num"]
    for sample in range(case.settings["B"]):
        attention, hidden = case.given["attn"][sample], case.given["hidden"][sample]
        index, features = kept(attention, hidden, count, seed)
        assert index.equal(case.expected["indices"][sample])
        assert index[1:].sort().values.equal(case.expected["kept"][sample] + 1)
        assert_equal_floats(features, case.expected["features"][sample])

        patches, scores = hidden[1:], attention[:, 0, 1:].sum(dim=0)
        group = loadings(patches.sigmoid(), count // 4, seed).argmax(dim=1)
        assert group.equal(case.expected["group"][sample])
        unit = normalize(patches, dim=-1)
        left = []
        for number in range(count // 4):
            members = (group == number).nonzero()[:, 0]
            members = members[scores[members].sort(descending=True).indices]
            left.append(int(survivors(unit[members], scores[members] > 0, limit(unit, count, True)).sum()))
        assert left == case.expected["survivors"][sample].tolist()


def test_components_are_those_of_torch_under_the_same_seed() -> None:
    for shape in ((60, 24), (24, 60)):
        rows = random(*shape).sigmoid()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            expected = torch.pca_lowrank(rows.T, q=6)[2].abs()
        torch.testing.assert_close(loadings(rows, 6, 7), expected, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(loadings(rows, 6, 8), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("sizes", "left", "budget", "expected"),
    [
        # 11 after one each and the class token: shares 6, 2, 1, 2. The first group may give 5 in all, not 7; what it
        # may not give goes to the group with most survivors that may give more.
        ([20, 10, 10, 10], [20, 5, 5, 5], 16, [5, 5, 2, 3]),
        # The bounds 5, 2, 2, 2 sum to less than 16, and are raised twice, to 7, 4, 4, 4: shares 7, 2, 1, 1.
        ([12, 6, 6, 6], [12, 2, 2, 2], 16, [7, 4, 2, 2]),
        # 3 for two groups of equal survivors: 1.5 is rounded to 2, the even neighbour, and 5 for 2.5 to 2.
        ([9, 9], [4, 4], 6, [3, 2]),
        ([9, 9], [4, 4], 8, [3, 4]),
        # An empty group gives nothing, and a group never more than it has.
        ([0, 3, 9], [0, 2, 1], 12, [0, 3, 8]),
    ],
)
def test_budget(sizes: list[int], left: list[int], budget: int, expected: list[int]) -> None:
    assert quotas(sizes, left, budget, passed_on=1) == expected


def test_the_bound_grows_with_every_64_tokens() -> None:
    sizes, left = [100] * 16, [100, *[5] * 15]
    assert quotas(sizes, left, 64, passed_on=1)[0] == 5
    assert quotas([100] * 17, [100, *[10] * 16], 68, passed_on=1)[0] == 10


def test_suppression() -> None:
    """The second is alike to the first and gone, so it does not suppress the third; the fourth has no attention."""
    degrees = torch.deg2rad(torch.tensor([0.0, 20, 40, 120]))
    unit = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    attended = torch.tensor([0.5, 0.3, 0.2, 0.0]) > 0
    assert survivors(unit, attended, torch.tensor(0.9)).tolist() == [True, False, True, False]
    assert survivors(unit, attended, torch.tensor(1.1)).tolist() == [True, True, True, False]


def test_threshold() -> None:
    unit = normalize(random(9, 4) + 0.5, dim=-1)
    cosines = unit @ unit.T
    pairs = cosines[tuple(torch.triu_indices(9, 9, 1))]
    torch.testing.assert_close(limit(unit, 16, True).float(), 16 / 32 * pairs.mean())
    torch.testing.assert_close(limit(unit, 2, False).float(), 36 / 9 * cosines.triu().mean())
    torch.testing.assert_close(limit(unit[:1], 1, True).float(), torch.tensor(0.0))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 29, 30])
def test_any_budget(count: int) -> None:
    index, features = kept(random(2, 1, 31).softmax(dim=-1), hidden := random(31, 8), count)
    assert index[0] == 0
    assert len(index.unique()) == count
    assert features.equal(hidden[index])


@pytest.mark.parametrize("count", [1, 4, 12, 30])
def test_without_a_class_token(count: int) -> None:
    reducer, geometry = PruneSid(count), replace(GEOMETRY, class_token=False)
    (step,) = reducer.steps(geometry)
    selection = show(reducer, step, random(30, 8), geometry=geometry)
    assert selection.index.tolist() == sorted(set(selection.index.tolist()))
    assert len(selection.index) == count
