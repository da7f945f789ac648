"""ApET keeps, replaces and merges what the official code does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import AtEncoderOutput, AtProjector, Selection, tokens_to_keep
from tokenreduce_plugins.apet import ApEt, errors, farthest

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show


@dataclass
class Given:
    """One selection of the official code: ``rows`` (n, dim) it was made among, and its own results."""

    rows: Tensor
    basis: Tensor
    errors: Tensor
    order: Tensor
    kept: Tensor
    features: Tensor
    inside: bool = False
    half: bool = False
    passing: Tensor | None = None

    @property
    def passed(self) -> Tensor:
        return self.rows[:0] if self.passing is None else self.passing


def made(rows: Tensor, basis: Tensor, others: Sequence[Tensor]) -> Given:
    errors, order, kept, features = others
    return Given(rows, basis, errors, order, kept, features)


def encoder_cases() -> list[Given]:
    given = []
    for parameter in cases("apet"):
        case = parameter.values[0]
        assert isinstance(case, Case)
        names = ("basis", "errors", "order", "kept", "features")
        for sample in range(case.settings["B"]):
            basis, *others = (case.expected[name][sample] for name in names)
            given.append(made(case.given["hidden"][sample, 1:], basis, others))
    return given


def decoder_cases() -> list[Given]:
    given = []
    for parameter in cases("apet_llm"):
        case = parameter.values[0]
        assert isinstance(case, Case)
        start = case.settings["image_start"]
        pool = min(case.settings["image_tokens"], case.settings["image_token_list"][0])
        hidden, expected = case.given["hidden"][0], case.expected
        end, kept = start + case.settings["image_tokens"], len(expected["kept"])
        assert expected["hidden"][0, :start].equal(hidden[:start]), "text before passes"
        assert expected["hidden"][0, start + kept :].equal(hidden[start + pool :]), "what follows passes"
        given.append(
            Given(
                hidden[start : start + pool],
                expected["basis"][0],
                expected["errors"],
                expected["order"],
                expected["kept"],
                expected["hidden"][0, start : start + kept],
                inside=True,
                passing=hidden[start + pool : end],
            )
        )
    return given


def qwen_cases() -> list[Given]:
    given = []
    for parameter in cases("apet_qwen"):
        case = parameter.values[0]
        assert isinstance(case, Case)
        expected = case.expected
        names = ("errors", "order", "kept", "features")
        own = [expected[name] for name in names]
        given.append(replace(made(case.given["features"], expected["basis"][0], own), half=True))
        assert len(expected["kept"]) == tokens_to_keep(case.settings["image_token_ratio"], len(case.given["features"]))
    return given


ALL = [*encoder_cases(), *decoder_cases(), *qwen_cases()]


def select(given: Given, **knobs: Any) -> Selection:
    """What the reducer makes of the same tokens."""
    kept, many = len(given.kept), len(given.rows)
    sizes: dict[str, Any] = {"keep": many, "later": kept, "pool": "first"} if given.inside else {"keep": kept}
    how: dict[str, Any] = {"basis_token_num": len(given.basis), "start": int(given.basis[0])}
    reducer = ApEt(**{**sizes, **how, "replace": "half" if given.half else "full", **knobs})
    step = reducer.steps(GEOMETRY)[int(given.inside)]
    return show(reducer, step, torch.cat([given.rows, given.passed]))


@pytest.mark.parametrize("given", ALL)
def test_official_vectors(given: Given) -> None:
    basis = farthest(given.rows, given.basis[:1], len(given.basis))
    assert basis.equal(given.basis)
    assert_equal_floats(errors(given.rows, basis), given.errors)
    selection, kept = select(given), len(given.kept)
    assert selection.features is not None
    assert selection.index[:kept].equal(given.kept)
    assert selection.index[kept:].tolist() == list(range(len(given.rows), len(given.rows) + len(given.passed)))
    assert_equal_floats(selection.features[:kept], given.features)
    assert selection.features[kept:].equal(given.passed)

    source = selection.sources(len(given.rows) + len(given.passed))
    anchors, slots = given.order.split([kept - len(basis), len(basis)])
    assert given.kept[source[anchors]].equal(anchors)
    slots = slots if given.inside else slots.sort().values
    assert given.kept[source[basis]].equal(slots), "basis tokens are in the rows that stand at other tokens' places"
    if not given.half:
        assert (source[slots] == -1).all(), "what they replace is in none"


@dataclass
class Result:
    kept: Tensor
    features: Tensor
    errors: Tensor


def by_loop(given: Given, mistake: str = "") -> Result:
    """The rule in plain steps, perhaps with a mistake."""
    rows, count = given.rows.double(), len(given.kept)
    size = int(mistake.rpartition("_")[2]) if mistake.startswith("basis_number") else len(given.basis)
    picked = [0 if mistake == "fps_start_0" else int(given.basis[0])]
    points = normalize(rows, dim=-1) if mistake == "fps_cosine" else rows
    while len(picked) < size:
        distances = (points[:, None] - points[picked]).square().sum(-1)
        total = distances.sum(1) if mistake == "fps_sum_of_distances" else distances.amin(1)
        picked.append(int(total.argmax()))
    chosen = rows[picked]
    ridge = {"ridge_0.1": 0.1, "ridge_10": 10.0}.get(mistake, 1e-5)
    gram = chosen @ chosen.T + ridge * torch.eye(size, dtype=torch.double)
    left = (rows - rows @ chosen.T @ gram.inverse() @ chosen).norm(dim=-1)
    left = left / rows.norm(dim=-1) if mistake == "relative_error" else left
    order = left.argsort(descending=mistake != "low_error_kept")[:count]
    anchors, slots = order[:-size], order[-size:]
    raster = given.inside if mistake in {"slots_in_raster_order", "slots_in_error_order"} else not given.inside
    slots = slots.sort().values if raster else slots
    if mistake == "basis_kept_at_own_positions":
        slots = torch.tensor(picked)
        anchors = torch.tensor([each for each in left.argsort(descending=True).tolist() if each not in picked])
        anchors = anchors[: count - size]
    kept = torch.cat([anchors, slots])
    unit = rows if mistake == "dot_product_instead_of_cosine" else normalize(rows, dim=-1)
    targets = kept if mistake == "basis_slots_also_receive_merges" else anchors
    out, members = rows.clone(), torch.ones(len(rows), 1, dtype=torch.double)
    half = (given.half and mistake != "full_replacement") or mistake == "half_and_half_replacement"
    replaced = (rows[slots] + chosen) / 2 if half else chosen
    out[slots] = replaced
    likeness = unit.clone()
    likeness[slots] = replaced if mistake == "dot_product_instead_of_cosine" else normalize(replaced, dim=-1)
    if mistake == "kept_token_not_counted_in_mean":
        out[anchors], members[anchors] = 0, 0
    for place in range(len(rows)):
        if place in kept or mistake == "no_merging":
            continue
        if mistake == "dropped_basis_positions_not_merged" and place in picked:
            continue
        target = targets[(likeness[targets] @ unit[place]).argmax()]
        out[target] += rows[place]
        members[target] += 1
    kept = kept.sort().values
    return Result(kept, (out / members.clamp(min=1))[kept].float(), left.float())


def recorded() -> list[Any]:
    """Every mistake that a case of the vectors names, and what it changes there."""
    found, places = [], iter(ALL)
    for name in ("apet", "apet_llm", "apet_qwen"):
        for parameter in cases(name):
            case = parameter.values[0]
            assert isinstance(case, Case)
            samples = [next(places) for _ in range(case.settings.get("B", 1))]
            for mistake, change in case.about["sensitivity"].items():
                if " " not in mistake:
                    found.append(pytest.param(samples, mistake, change, id=f"{parameter.id}-{mistake}"))
    return found


@pytest.mark.parametrize("given", ALL)
def test_the_loop_gives_the_official_result(given: Given) -> None:
    found = by_loop(given)
    assert found.kept.equal(given.kept)
    assert_equal_floats(found.features, given.features)


@pytest.mark.parametrize(("samples", "mistake", "change"), recorded())
def test_mistakes_are_noticed(samples: list[Given], mistake: str, change: list[float]) -> None:
    found = [by_loop(given, mistake) for given in samples]
    pairs = list(zip(found, samples, strict=True))
    kept = max(len({*each.kept.tolist()} ^ {*given.kept.tolist()}) for each, given in pairs)
    features = max(float((each.features - given.features).abs().max()) for each, given in pairs)
    residuals = max(float((each.errors - given.errors).abs().max()) for each, given in pairs)
    assert kept == change[0]
    assert features == pytest.approx(change[1], abs=1e-3)
    assert residuals == pytest.approx(change[2], abs=1e-3)


def test_mistakes_about_counts_are_noticed() -> None:
    (given,) = [given for given in ALL if len(given.passed)]
    found = select(given, keep=44, pool="all").index.tolist()
    assert len({*found} ^ {*given.kept.tolist()}) == 14, "as recorded, if all tokens of the picture compete"
    for parameter in cases("apet_qwen"):
        case = parameter.values[0]
        assert isinstance(case, Case)
        exact = case.settings["image_token_ratio"] * len(case.given["features"])
        change = case.about["sensitivity"]["round_instead_of_int (difference in count)"][0]
        assert abs(round(exact) - len(case.expected["kept"])) == change


ROWS = torch.tensor(
    [
        [4, 0, 0],
        [3, 1, 0.2],
        [0, 3, 0],
        [0, 2, 1.2],
        [1, 1, 0.7],
        [0, 0.5, 2],
        [1, 0, 1.5],
        [2, 2, 0.3],
        [0.5, 0.1, 0.4],
    ]
)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # 0 and 2 span the first two axes, so that errors are what tokens have of the third. Of the kept 5, 6, 3, 4 and
        # 8 the last two make room for 0 and 2; 2 and 7 go to 3, 0 and 1 to 6.
        ("full", [[2 / 3, 7 / 3, 0.5], [4, 0, 0], [0, 0.5, 2], [8 / 3, 1 / 3, 1.7 / 3], [0, 3, 0]]),
        ("half", [[2 / 3, 7 / 3, 0.5], [2.5, 0.5, 0.35], [0, 0.5, 2], [8 / 3, 1 / 3, 1.7 / 3], [0.25, 1.55, 0.2]]),
    ],
)
def test_worked_example(inside: bool, how: Any, expected: list[list[float]]) -> None:
    reducer = ApEt(9 if inside else 5, later=5, basis_token_num=2, start=0, replace=how)
    selection = show(reducer, reducer.steps(GEOMETRY)[int(inside)], ROWS)
    assert selection.index.tolist() == [3, 4, 5, 6, 8]
    assert selection.features is not None
    torch.testing.assert_close(selection.features, torch.tensor(expected), atol=1e-4, rtol=0.0)
    vanished = 4 if how == "half" else -1
    assert selection.sources(9).tolist() == [1, 3, 4, 0, 1 if how == "half" else -1, 2, 3, 0, vanished]


def test_another_start_keeps_others() -> None:
    reducer = ApEt(5, basis_token_num=2, start=4)
    assert farthest(ROWS, torch.tensor([4]), 2).tolist() == [4, 0]
    assert show(reducer, reducer.steps(GEOMETRY)[0], ROWS).index.tolist() == [1, 2, 5, 6, 7]


@pytest.mark.parametrize("keep", [1, 2, 10, 11, 28, 29, 30])
def test_any_budget(keep: int) -> None:
    """Basis tokens never stand twice, however many are kept."""
    reducer, rows = ApEt(keep), random(30, 8)
    selection = show(reducer, reducer.steps(GEOMETRY)[0], rows)
    assert len(selection.index) == keep
    if keep == 30:
        assert selection.features is None
    if keep > 1:
        own = rows if selection.features is None else selection.features
        assert len(own.unique(dim=0)) == keep


def test_duplicates_are_no_basis_twice() -> None:
    rows = random(3, 4).repeat_interleave(4, dim=0)
    assert len(farthest(rows, torch.tensor([0]), 6).unique()) == 6


def test_sites() -> None:
    first, second = ApEt(later=96).steps(GEOMETRY)
    assert isinstance(first, AtEncoderOutput) and second.decoder_layer(GEOMETRY) == 16
    assert len(ApEt(later=1).steps(GEOMETRY)) == 2, "a single token is no ratio"
    (only,) = ApEt(later=1.0).steps(replace(GEOMETRY, patches_per_token=4))
    assert isinstance(only, AtProjector)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"basis_token_num": 0}, "give at least one basis token"), ({"start": -1}, "start=-1: give at least")],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ApEt(**knobs)


def test_a_start_that_does_not_exist_is_refused() -> None:
    reducer = ApEt(5, start=9)
    with pytest.raises(ValueError, match="start=9: there are 9 tokens"):
        show(reducer, reducer.steps(GEOMETRY)[0], ROWS)
