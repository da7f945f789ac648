"""DTD keeps what the official code keeps, by features and by pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.image_utils import OPENAI_CLIP_STD

from tokenreduce import reduce_tokens
from tokenreduce.models.loading import load
from tokenreduce.reducer import Grid, Span, Tile, VisualTokens
from tokenreduce.testing.checkpoints import ask, recipes, video
from tokenreduce_plugins.dtd import Dtd, PixelChange, patch_change

from .golden import GEOMETRY, Case, cases, random
from .videos import kept, numbers

CLIP = torch.tensor(OPENAI_CLIP_STD)


def shown(case: Case) -> tuple[Tensor, Grid, Dtd, dict[Any, Tensor]]:
    """A case's video ``(frames, tokens, dim)``, its grid, the method and what of the pixels it is shown."""
    settings = case.settings
    frames, grid = settings["grid_t"], Grid(settings["tok_h"], settings["tok_w"])
    first = settings["prefix"] + 1
    features = case.given["hidden"][first : first + frames * len(grid)].view(frames, len(grid), -1)
    reducer = Dtd(settings["method"], settings["threshold"], settings["absolute"])
    signals = {PixelChange(): changes(case.given["pixels"], frames, len(grid))} if "pixels" in case.given else {}
    return features, grid, reducer, signals


def changes(pixels: Tensor, frames: int, places: int) -> Tensor:
    change = patch_change(pixels, frames, places, 2, CLIP)
    return torch.cat([change.new_zeros(1, places), change])


@pytest.mark.parametrize("case", cases("dtd"))
def test_official_vectors(case: Case) -> None:
    features, grid, reducer, signals = shown(case)
    found = kept(reducer, features, grid, signals=signals)
    assert found == case.expected["kept_video"].tolist()
    start, total, length = case.settings["prefix"] + 1, features[..., 0].numel(), len(case.given["hidden"])
    places = [*range(start), *(start + place for place in found), *range(start + total, length)]
    assert places == case.expected["kept_positions"].tolist()
    assert case.given["position_ids"][:, places].equal(case.expected["position_ids"].int())
    assert reducer.positions == "original"


def by_features(features: Tensor, threshold: float, *, against: str = "before", whole: bool = True) -> list[int]:
    """The rule in a plain loop; every setting but the default is a mistake."""
    chosen, last = [], features[0].clone()
    for number, frame in enumerate(features):
        reference = {"before": features[number - 1], "first": features[0], "kept": last}[against]
        for place, token in enumerate(frame):
            alike = cosine_similarity(token, reference[place], dim=0) > threshold
            if (number == 0 and whole) or not alike:
                chosen.append(number * len(frame) + place)
                last[place] = token
    return chosen


@pytest.mark.parametrize("case", cases("dtd")[:2])
def test_a_near_miss_in_what_is_compared_keeps_others(case: Case) -> None:
    features, _, reducer, _ = shown(case)
    expected = case.expected["kept_video"].tolist()
    assert by_features(features, reducer.threshold) == expected
    for mistake in ({"against": "first"}, {"against": "kept"}, {"whole": False}):
        assert by_features(features, reducer.threshold, **mistake) != expected, mistake
    assert kept(Dtd("feature", reducer.threshold, absolute=False), features) != expected


@pytest.mark.parametrize("case", cases("dtd")[4:])
def test_a_near_miss_in_pixels_keeps_others(case: Case) -> None:
    features, grid, reducer, _ = shown(case)
    patches = case.given["pixels"].view(len(features), len(grid), 4, 3, 2, 196)
    mistakes: dict[str, Callable[[Tensor], Tensor]] = {
        "not in [0, 1]": lambda rows: (rows[1:, ..., 1, :] - rows[:-1, ..., 0, :]).abs(),
        "moments in the other order": lambda rows: (rows[1:, ..., 0, :] - rows[:-1, ..., 1, :]).abs() * CLIP[:, None],
        "the mean before the difference": lambda rows: (
            (rows[1:, ..., 1, :] - rows[:-1, ..., 0, :]).mean((2, 3, 4), keepdim=True).abs() * CLIP[:, None]
        ),
    }
    told_apart = []
    for mistake, change in mistakes.items():
        wrong = change(patches).mean((2, 3, 4))
        signals = {PixelChange(): torch.cat([wrong[:1] * 0, wrong])}
        if kept(reducer, features, grid, signals=signals) != case.expected["kept_video"].tolist():
            told_apart.append(mistake)
    assert told_apart == list(mistakes)


EXAMPLE = torch.tensor([[[1, 0], [0, 1], [1, 1]], [[1, 0.1], [1, 0], [1, 1]], [[0.9, 0.3], [1, 0.1], [-1, 1]]])


@pytest.mark.parametrize(
    ("threshold", "absolute", "expected"),
    [
        (0.5, True, [0, 1, 2, 4, 8]),
        (0.98, True, [0, 1, 2, 4, 6, 8]),
        (0.5, False, [0, 1, 2, 3, 4, 6, 8]),  # one of three goes: the most similar
        (0.0, False, [*range(9)]),
        (1.0, False, [0, 1, 2]),
    ],
)
def test_worked_example(threshold: float, absolute: bool, expected: list[int]) -> None:
    assert kept(Dtd("feature", threshold, absolute), EXAMPLE) == expected


def test_pixels_are_compared_from_the_first_moment_before_to_the_last_one_now() -> None:
    """Two frames of one place, four patches of 2 x 2 moments each: only these two moments differ."""
    pixels = torch.zeros(2, 1, 4, 3, 2, 4)
    pixels[0, ..., 0, :] = 1
    pixels[1, ..., 1, :] = 3
    change = patch_change(pixels.flatten(0, 2).flatten(1), 2, 1, 2, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(change, torch.tensor([[0.4]]))


@pytest.mark.parametrize("role", ["whole", "frame"])
@pytest.mark.parametrize("method", ["feature", "pixel"])
def test_an_image_and_a_video_of_one_frame_stay_whole(method: Any, role: Any) -> None:
    assert kept(Dtd(method, 0.0), torch.ones(1, 6, 4), role=role) == [*range(6)]


@pytest.mark.parametrize("absolute", [True, False])
def test_the_parts_of_an_image_are_no_frames(absolute: bool) -> None:
    assert kept(Dtd("feature", 0.5, absolute), torch.ones(3, 4, 2), role="crop") == [*range(12)]


@pytest.mark.parametrize("absolute", [True, False])
def test_what_has_nothing_before_it_stays(absolute: bool) -> None:
    """Of the second frame only the last place is left, of the third the first and the last."""
    frames = torch.ones(3, 3, 2)
    left = torch.tensor([0, 1, 2, 5, 6, 8])
    frame, place = (each[left] for each in numbers(frames))
    span = Span(GEOMETRY, (Tile(Grid(1, 3), role="frame"),) * 3, 6, 6)
    reducer = Dtd("feature", 0.5, absolute)
    (step,) = reducer.steps(GEOMETRY)
    assert reducer.count(step, span) == (0, 6)
    tokens = VisualTokens(frames.flatten(0, 1)[left], span, (0, 6), tile=frame, place=place)
    assert reducer.select(step, tokens).index.tolist() == ([0, 1, 2, 4] if absolute else [0, 1, 2, 3, 4])


def test_frames_that_repeat_go_and_frames_of_noise_stay() -> None:
    noise = random(1, 16, 32)
    assert kept(Dtd(), noise.expand(4, -1, -1)) == [*range(16)]
    assert len(kept(Dtd(), random(4, 16, 32))) == 64


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "llava_next_video", "video_llava"])
def test_pixels_of_a_model(checkpoint: Callable[[str], Path], name: str) -> None:
    """Of a clip that stands still one frame is left, and of one whose corner changes once a few tokens more."""
    model, processor = load(str(checkpoint(name)), attention=recipes()[name].attention)
    frames = np.repeat(video(0, 1, 64, 64), 8, axis=0)
    moved = frames.copy()
    moved[4:, :16, :16] = 255 - moved[4:, :16, :16] // 8
    batch = ask(processor, [[], []], [[moved], [frames]])
    with reduce_tokens(model, Dtd("pixel", 0.001), processor=processor) as reduction, torch.no_grad():
        model(**batch)
    first, second = [[len(image.kept) for image in sample.images if len(image.kept)] for sample in reduction.samples]
    assert len(second) == 1
    assert sum(second) < sum(first) < 2 * sum(second)


def test_pixels_need_the_processor(checkpoint: Callable[[str], Path]) -> None:
    model, _ = load(str(checkpoint("qwen2_5_vl")), attention=recipes()["qwen2_5_vl"].attention)
    with pytest.raises(ValueError, match="pass processor= to reduce_tokens"), reduce_tokens(model, Dtd("pixel", 0.1)):
        pass


def test_a_share_outside_of_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold=1\.5 is no share of a frame"):
        Dtd("feature", 1.5, absolute=False)
