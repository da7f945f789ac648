"""VidCom2 keeps what the official code keeps, and in its exact form what vLLM keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenreduce.reducer import Grid, Span, Tile, VisualTokens
from tokenreduce_plugins.vidcom2 import VidCom2, likeness, scales

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random
from .videos import kept, numbers


def scored(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two likenesses ``(frames, tokens)`` and what frames weigh ``(frames,)``."""
    scores = likeness(frames.flatten(0, 1), numbers(frames)[0], len(frames))
    video, frame = (score.view(frames.shape[:2]) for score in scores)
    return video, frame, (-video.mean(dim=1) / 0.01).softmax(0)


@pytest.mark.parametrize("case", cases("vidcom2"))
def test_official_vectors(case: Case) -> None:
    frames, base = case.given["x"], case.settings["base_scale"]
    video, frame, weights = scored(frames)
    assert_equal_floats(video, case.expected["video_score"])
    assert_equal_floats(frame, case.expected["frame_score"])
    assert_equal_floats(scales(weights, base), case.expected["scales"])
    found = kept(VidCom2(base), frames)
    assert found == case.expected["kept"].tolist()
    each = torch.tensor(found) // frames.shape[1]
    assert each.bincount(minlength=len(frames)).equal(case.expected["per_frame"])


@pytest.mark.parametrize("case", cases("vidcom2_grid"))
def test_official_vectors_of_llava_video(case: Case) -> None:
    """There every row of 13 tokens ends with a newline, and those of a frame come after its tokens."""
    frames, base = case.given["x"], case.settings["base_scale"]
    assert_equal_floats(scales(scored(frames)[2], base), case.expected["scales"])
    places = kept(VidCom2(base), frames, Grid(13, 13))
    expected = []
    for number in range(len(frames)):
        own = [place - 169 * number for place in places if place // 169 == number]
        expected += [182 * number + place // 13 * 14 + place % 13 for place in own]
        expected += [182 * number + newline for newline in range(13, 182, 14)]
    assert expected == case.expected["kept"].tolist()


@pytest.mark.parametrize("case", cases("vidcom2_vllm"))
def test_vectors_of_vllm(case: Case) -> None:
    frames, keep = video_of(case)
    video, frame, _ = scored(frames)
    assert_equal_floats(video + frame, case.expected["similarity"])
    found = kept(VidCom2(keep, exact=True), frames)
    assert found == case.expected["kept"].tolist()
    assert len(found) == case.settings["count"]
    before = torch.tensor(kept(VidCom2(keep), frames)) // frames.shape[1]
    assert before.bincount(minlength=len(frames)).tolist() == case.settings["per_frame_before"]


def video_of(case: Case) -> tuple[Tensor, float]:
    """A case's video ``(frames, tokens, dim)`` and the share of it that is kept."""
    return case.given["x"].view(case.settings["T"], -1, case.settings["D"]), 1 - case.settings["q"]


def mistaken(
    frames: Tensor,
    share: float,
    count: int | None = None,
    *,
    steady: bool = True,
    unit: bool = False,
    late: bool = False,
    temperature: float = 0.01,
    widths: tuple[float, ...] = (0.125, 0.25, 0.5, 1, 2),
    floor: bool = False,
    least: int = 1,
    budgeted: bool = True,
    by: tuple[float, float] = (1, 1),
    worst: bool = False,
    turns: bool = False,
) -> list[int]:
    """The rule in plain loops, in double precision; every setting but the default is a mistake."""
    features = frames.double()
    rows = features.flatten(0, 1)
    variance = (normalize(rows, dim=-1) if late else rows).var(dim=0, correction=0)
    channels = variance.argsort(descending=not steady)[: max(1, rows.shape[1] // 2)]
    states = normalize(features[..., channels], dim=-1)

    def alike(centres: Tensor) -> Tensor:
        centres = normalize(centres, dim=-1) if unit else centres
        squared = (states - centres).square().sum(-1)
        return torch.stack([(-squared / (2 * width)).exp() for width in widths]).sum(0)

    video, frame = alike(states.mean((0, 1))), alike(states.mean(1, keepdim=True))
    weights = (-video.mean(1) / temperature).softmax(0)
    score, scale = (video + frame).flatten().tolist(), (share * (1 + weights - weights.mean())).clamp(max=1)
    each, total = frames.shape[1], len(rows)
    chosen: list[int] = []
    for number, part in enumerate(scale.tolist()):
        budget = min(each, max(least, math.floor(part * each) if floor else round(part * each)))
        own = sorted(range(number * each, number * each + each), key=lambda place: score[place])
        chosen += own[:budget]
    if not budgeted:
        chosen = []
    if count is None:
        return sorted(chosen)
    second = (by[0] * video + by[1] * frame).flatten().tolist()
    sign = -1 if worst else 1
    while len(chosen) != count:
        surplus = len(chosen) > count
        pool = chosen if surplus else [place for place in range(total) if place not in chosen]
        if turns:
            sizes = [sum(place // each == number for place in chosen) for number in range(len(frames))]
            number = max(range(len(frames)), key=lambda one: sizes[one] if surplus else -sizes[one])
            pool = [place for place in pool if place // each == number]
        pick = sorted(pool, key=lambda place: sign * second[place])[-1 if surplus else 0]
        chosen = [place for place in chosen if place != pick] if surplus else [*chosen, pick]
    return sorted(chosen)


MISTAKES: dict[str, dict[str, Any]] = {
    "highest-variance channels": {"steady": False},
    "centres renormalised": {"unit": True},
    "channel variance after normalisation": {"late": True},
    "softmax temperature 1": {"temperature": 1.0},
    "one Gaussian only": {"widths": (1.0,)},
    "budgets floored before reconciliation": {"floor": True},
    "one global top-n, no frame budgets": {"budgeted": False},
    "reconciliation by video similarity only": {"by": (1, 0)},
    "reconciliation by frame similarity only": {"by": (0, 1)},
    "reconciliation drops the lowest / adds the highest similarity": {"worst": True},
}


@pytest.mark.parametrize("case", cases("vidcom2_vllm"))
def test_a_near_miss_keeps_others_where_that_is_recorded(case: Case) -> None:
    frames, keep = video_of(case)
    count, expected, detects = case.settings["count"], case.expected["kept"].tolist(), case.about["detects"]
    assert mistaken(frames, keep, count) == expected
    for mistake, settings in MISTAKES.items():
        if mistake in detects:
            assert mistaken(frames, keep, count, **settings) != expected, mistake
    turns = "reconciliation takes frames in turn instead of the global score"
    if turns in detects:
        assert mistaken(frames, keep, count, turns=True) != expected
    if "reconciliation left out (reference repository behaviour)" in detects:
        assert kept(VidCom2(keep), frames) != expected
    assert len(kept(VidCom2(1 - keep, exact=True), frames)) != count, "q read as the kept fraction"
    total = frames.shape[0] * frames.shape[1]
    if "count floored from the exact decimal (no binary error of 1-q)" in detects:
        assert count == int(total * keep) == round(total * keep) - 1
    if "no minimum of one token per frame" in detects:
        assert count == len(frames) > int(total * keep)
    if "minimum of one whole frame (the EVS rule)" in detects:
        assert max(frames.shape[1], int(total * keep)) != count


@pytest.mark.parametrize("case", [*cases("vidcom2"), *cases("vidcom2_grid")])
def test_the_rule_in_plain_loops_keeps_the_same_and_near_misses_do_not(case: Case) -> None:
    frames, base = case.given["x"], case.settings["base_scale"]
    found = kept(VidCom2(base), frames)
    assert mistaken(frames, base) == found
    for mistake in ("highest-variance channels", "softmax temperature 1"):
        assert mistaken(frames, base, **MISTAKES[mistake]) != found, mistake


def angles(degrees: list[list[float]], *channels: Tensor) -> Tensor:
    """Tokens ``(frames, tokens, 4)``: cosine and sine of an angle, and two more channels."""
    turned = torch.tensor(degrees).deg2rad()
    return torch.stack([turned.cos(), turned.sin(), *channels], dim=-1)


def test_worked_example() -> None:
    """The last two channels vary least, and by them all tokens of a frame are the same."""
    scale = torch.tensor([0.2, 0.3, 1.0])[:, None].expand(3, 4)
    frames = angles([[0.0, 8.0, 30.0, 95.0]] * 3, scale, torch.ones(3, 4))
    video, frame, weights = scored(frames)
    assert_equal_floats(frame, torch.full((3, 4), 5.0))
    torch.testing.assert_close(video[:, 0], torch.tensor([4.6374, 4.8656, 4.1665]), atol=5e-5, rtol=0)
    torch.testing.assert_close(scales(weights, 0.5), torch.tensor([1, 1, 2.5]) / 3, atol=5e-5, rtol=0)
    assert kept(VidCom2(0.5), frames) == [0, 4, 8, 9, 10], "of equal tokens the first"


def test_worked_example_of_vllm() -> None:
    """Five tokens have a place in their frames' budgets, and the one most like the video goes: a frame is empty."""
    place = torch.arange(16.0).view(4, 4)
    degrees = [[75.0, 20.0, 5.0, 25.0], [35.0, 70.0, 40.0, 5.0], [30.0, 50.0, 70.0, 65.0], [175.0, 105.0, 165.0, 90.0]]
    frames = angles(degrees, place, -place)
    video, frame, _ = scored(frames)
    expected = [6.7233, 7.8266, 6.3412, 8.2191, 8.7644, 7.5935, 8.9715, 5.8684]
    expected += [7.5554, 9.2817, 8.6535, 9.0421, 3.9984, 6.2824, 4.6610, 6.1478]
    torch.testing.assert_close((video + frame).flatten(), torch.tensor(expected), atol=1e-4, rtol=0)
    assert kept(VidCom2(1 - 0.7), frames) == [2, 7, 8, 12, 14]
    assert kept(VidCom2(1 - 0.7, exact=True), frames) == [2, 7, 12, 14]


def exact_count(keep: int | float, frames: int, tokens: int) -> Any:
    reducer = VidCom2(keep, exact=True)
    span = Span(GEOMETRY, (Tile(Grid(1, tokens), role="frame"),) * frames, frames * tokens, frames * tokens)
    return reducer.count(reducer.steps(GEOMETRY)[0], span)


@pytest.mark.parametrize(
    ("keep", "frames", "tokens", "expected"),
    [(1 - 0.9, 2, 120, 23), (0.1, 2, 120, 24), (1 - 0.9, 20, 5, 20), (7, 4, 5, 7), (1000, 4, 5, 20), (1.0, 4, 5, 20)],
)
def test_exact_counts_are_rounded_down_but_one_a_frame(
    keep: int | float, frames: int, tokens: int, expected: int
) -> None:
    assert exact_count(keep, frames, tokens) == expected
    assert len(kept(VidCom2(keep, exact=True), random(frames, tokens, 6))) == expected


@pytest.mark.parametrize("shape", [(1, 7), (2, 3), (5, 16), (9, 1), (4, 50)])
@pytest.mark.parametrize("keep", [1, 0.01, 0.15, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_the_promised_range_holds(shape: tuple[int, int], keep: int | float, spread: float) -> None:
    """However different frames are: :func:`kept` compares with the count."""
    frames = random(*shape, 8) + spread * random(shape[0], 1, 8, seed=1)
    found = kept(VidCom2(keep), frames)
    assert {place // shape[1] for place in found} == set(range(shape[0])), "one of every frame at least"
    if isinstance(keep, float) and keep == 1 and shape[0] == 1:
        assert len(found) == shape[1]


def test_an_image_is_a_video_of_one_frame() -> None:
    image = random(1, 64, 8)
    for exact in (False, True):
        assert len(kept(VidCom2(0.25, exact), image, Grid(8, 8), role="whole")) == 16


def test_the_parts_of_an_image_share_one_budget() -> None:
    parts = random(5, 16, 8)
    assert kept(VidCom2(0.25), parts, role="crop") == kept(VidCom2(0.25), parts.flatten(0, 1)[None], role="whole")


def test_frames_may_have_lost_tokens_before() -> None:
    """What is left of a frame is what its share is of, and a frame of which nothing is left is none."""
    frames = random(4, 10, 8)
    left = torch.tensor([place for place in range(40) if place not in range(10, 20) and place % 10 != 3])
    frame, place = (each[left] for each in numbers(frames))
    span = Span(GEOMETRY, (Tile(Grid(2, 5), role="frame"),) * 4, len(left), len(left))
    reducer = VidCom2(0.5)
    (step,) = reducer.steps(GEOMETRY)
    count = reducer.count(step, span)
    index = reducer.select(step, VisualTokens(frames.flatten(0, 1)[left], span, count, tile=frame, place=place)).index
    assert isinstance(count, tuple)
    assert count[0] <= len(index) <= count[1]
    alone = kept(reducer, frames.flatten(0, 1)[left].view(3, 9, 8))
    assert index.tolist() == alone
