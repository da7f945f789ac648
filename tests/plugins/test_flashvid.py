"""FlashVID makes of a video what the official code makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import create
from tokenreduce.reducer import Geometry, Selection, Span, Tile
from tokenreduce.testing import check_reducer, prompts
from tokenreduce_plugins.flashvid import FlashVid, aggregated

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show, stored
from .videos import film, received, show_film

KNOBS = [
    "expansion",
    "alpha",
    "token_selection_method",
    "temporal_threshold",
    "segment_threshold",
    "min_segment_num",
    "complementary_segment",
    "do_segment",
    "llm_retention_ratio",
]


def settings(case: Case) -> dict[str, Any]:
    return {"keep": case.settings["retention_ratio"], **{name: case.settings[name] for name in KNOBS}}


def outer(features: Tensor, scores: Tensor, **knobs: Any) -> Selection:
    reducer = FlashVid(**knobs)
    step = reducer.steps(GEOMETRY)[0]
    return show_film(reducer, step, features, {step.sees[0]: received(scores)})


@pytest.mark.parametrize("case", cases("flashvid"))
def test_official_vectors(case: Case) -> None:
    selection = outer(case.given["x"], case.given["attention"], **settings(case))
    assert selection.index.equal(case.expected["index"])
    assert selection.features is not None and selection.source is not None
    assert_equal_floats(selection.features, case.expected["tokens"])
    assert selection.source[selection.index].equal(torch.arange(len(selection.index)))
    assert set(selection.source.tolist()) - {-1} == set(range(len(selection.index)))


@pytest.mark.parametrize("case", cases("flashvid"))
def test_official_vectors_inside_the_language_model(case: Case) -> None:
    reducer, attention = FlashVid(**settings(case)), case.given["llm_attention"]
    step, before = reducer.steps(GEOMETRY)[1], case.settings["text_before"]
    count, length = case.settings["realised"], attention.shape[1]
    view = stored(attention[:, None].expand(-1, length, -1), slice(before, before + count))
    kept = show(reducer, step, random(count, 4), {step.sees[0]: view}).index + before
    everything = [*range(before), *kept.tolist(), *range(before + count, length)]
    assert everything == case.expected["llm_kept"].tolist()


MISTAKES: dict[str, dict[str, Any]] = {
    "expansion ignored": {"expansion": 1.0},
    "no segmentation": {"do_segment": False},
    "no complementary cuts": {"complementary_segment": False},
    "attention ignored in ADTS": {"token_selection_method": "div"},
    "ADTS v1 and v2 exchanged": {},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("case", cases("flashvid"))
def test_mistakes_are_told_apart_where_the_vectors_say_so(case: Case, mistake: str) -> None:
    if mistake not in case.about["detects"]:
        return
    other = {"attn_div": "attn_div_v2", "attn_div_v2": "attn_div"}.get(case.settings["token_selection_method"])
    changes = MISTAKES[mistake] or {"token_selection_method": other}
    wrong = outer(case.given["x"], case.given["attention"], **{**settings(case), **changes})
    assert not wrong.index.equal(case.expected["index"])


def directions(degrees: Any) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


FRAMES = directions([[0.0, 40, 90, 140, 200], [5, 100, 60, 250, 145], [95, 10, 150, 205, 260]])


def test_worked_example_of_trees() -> None:
    """A chain of three is half of their sum, for its root has one direct child; 205 degrees has no match."""
    reducer = FlashVid(temporal_threshold=0.97)
    merging, parent = reducer.trees(FRAMES, torch.zeros(3, 5, dtype=torch.bool), 6)
    stays = (~merging).nonzero().tolist()
    assert stays == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [2, 3]]
    values = aggregated(FRAMES, merging, parent)
    assert_equal_floats(values[0, [0, 3]].round(decimals=4), torch.tensor([[1.4905, 0.1304], [-1.2256, 0.8582]]))
    assert_equal_floats(values[0, 0], (FRAMES[0, 0] + FRAMES[1, 0] + FRAMES[2, 1]) / 2)
    assert_equal_floats(values[1, 3].round(decimals=4), torch.tensor([-0.2578, -0.9623]))


def test_so_many_stay_as_are_needed() -> None:
    """Of 15 tokens 12 shall stay: the third likest pair is the threshold, and does not merge either."""
    merging, _ = FlashVid(temporal_threshold=-0.9).trees(random(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool), 12)
    assert int(merging.sum()) == 2


@pytest.mark.parametrize(("count", "expected"), [(1, [4]), (2, [1, 4]), (3, [1, 3, 4])])
def test_worked_example_of_picks(count: int, expected: list[int]) -> None:
    scores = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    reducer = FlashVid(token_selection_method="attn_div")
    assert reducer.picked(FRAMES[0], scores, FRAMES[0].mean(0), count).tolist() == expected


def test_segments() -> None:
    alike = [0.95, 0.5, 0.97, 0.92, 0.99]
    assert FlashVid(min_segment_num=2).segments(alike) == [2, 4]
    assert FlashVid(min_segment_num=3).segments(alike) == [2, 2, 2]
    assert FlashVid(min_segment_num=3, complementary_segment=False).segments(alike) == [2, 4]
    assert FlashVid(min_segment_num=20).segments(alike) == [1] * 6
    assert FlashVid().segments([]) == [1]


def test_an_image_is_a_frame_alone_of_which_a_token_may_be_in_two_rows() -> None:
    """Eight of 20 tokens are picked, and all 20 clustered into 2; a centre that is picked has a row of no token."""
    reducer, features, scores = FlashVid(0.4, alpha=0.8), random(20, 4), random(1, 20).abs()
    step = reducer.steps(GEOMETRY)[0]
    selection = show(reducer, step, features, {step.sees[0]: received(scores)[0]})
    assert len(selection.index) == 10 and selection.features is not None
    own = [place for place in selection.index.tolist() if place >= 0]
    assert own == sorted(own) and 8 <= len(own) <= 10
    unchanged = [
        row
        for row, place in enumerate(selection.index.tolist())
        if torch.equal(features[place], selection.features[row])
    ]
    assert len(unchanged) >= 8


def test_a_picked_centre_has_a_second_row_behind_its_own() -> None:
    """With as many clusters as can be, some centre is picked as well: its row stands for no token."""
    selection = outer(random(1, 12, 4), random(1, 12).abs(), keep=0.7, alpha=0.5, expansion=1.0)
    index = selection.index.tolist()
    assert len(index) == 9 and -1 in index and index[0] >= 0
    assert selection.source is not None and selection.source.min() >= 0


def test_counts() -> None:
    reducer = FlashVid(0.1)
    outside, inside = reducer.steps(GEOMETRY)
    assert reducer.count(outside, film(4, 196)) == (100, 104), "25 a frame, and one more by rounding"
    assert reducer.shares(film(4, 196), 196) == (18, 7)
    geometry = Geometry(encoder_layers=4, decoder_layers=28, feature_layer=3, class_token=False)
    assert inside.decoder_layer(GEOMETRY) == 23 and reducer.steps(geometry)[1].decoder_layer(geometry) == 20
    assert FlashVid(llm_retention_ratio=0.07).count(inside, film(10, 10)) == 8, "100 * 0.07 is above 7"
    image = Span(GEOMETRY, (Tile(film(1, 169).grid),), 169, 169)
    assert FlashVid(0.11).shares(image, 169) == (17, 7)
    assert FlashVid(0.11).count(outside, image) == 25, "169 * (7 / 169) is above 7"


def test_everything_and_almost_nothing_can_be_kept() -> None:
    features, scores = random(3, 6, 4), random(3, 6).abs()
    whole = outer(features, scores, keep=1.0)
    assert whole.index.tolist() == list(range(18))
    assert_equal_floats(whole.features, features.flatten(0, 1))  # type: ignore[arg-type]
    assert len(outer(features, scores, keep=0.01).index) == 3


@pytest.mark.parametrize(
    ("knob", "value", "message"), [("alpha", 1.5, "alpha=1.5"), ("llm_retention_ratio", 0.0, "ratio")]
)
def test_settings_without_sense_are_refused(knob: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashVid(**{knob: value})


def test_in_a_model(llava: LlavaForConditionalGeneration) -> None:
    check_reducer(FlashVid(0.4, pruning_layer=2), llava, prompts(llava, [1, 2]))


def test_presets() -> None:
    assert create("flashvid_r10") == FlashVid(0.1)
    qwen3 = create("flashvid_qwen3")
    assert qwen3 == FlashVid(
        token_selection_method="attn_div",
        min_segment_num=4,
        pruning_layer=28 / 36,
        llm_retention_ratio=0.1,
        positions="original",
    )
