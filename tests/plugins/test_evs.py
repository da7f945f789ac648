"""EVS keeps what vLLM keeps, where it keeps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenreduce.models.qwen2_5_vl import Qwen2_5VL
from tokenreduce.models.qwen3_vl import Qwen3VL
from tokenreduce_plugins.dtd import Evs

from .golden import Case, cases, random
from .videos import kept

IMAGE, VIDEO = 1001, 1002


def video_of(case: Case) -> Tensor:
    """A case's video ``(frames, tokens, dim)``."""
    return case.given["x"].view(case.settings["T"], -1, case.settings["D"])


@pytest.mark.parametrize("case", cases("evs"))
def test_official_vectors(case: Case) -> None:
    found = kept(Evs(1 - case.settings["q"]), video_of(case))
    assert found == case.expected["kept"].tolist()
    assert len(found) == case.settings["count"]
    mask = torch.zeros(len(case.given["x"]), dtype=torch.bool)
    assert mask.index_fill(0, torch.tensor(found), True).equal(case.expected["mask"])


def transformers_positions(case: Case, ids: list[int]) -> Tensor:
    """The ids ``(3, length)`` that transformers gives the tokens of a whole prompt."""
    settings, frames = case.settings, case.settings["T"]
    grid = [frames, settings["H"], settings["W"]]
    third = settings["layout"] == "qwen3"
    family, name = (Qwen3VL, "Qwen3VL") if third else (Qwen2_5VL, "Qwen2_5_VL")
    (recipe,) = [one for key, one in family.recipes().items() if key in ("qwen2_5_vl", "qwen3_vl")]
    config = recipe.config(dict.fromkeys(recipe.tokens, 0))
    config.vision_config.spatial_merge_size = settings["spatial_merge_size"]
    seconds = {}
    if not third:
        config.vision_config.tokens_per_second = int(settings["tokens_per_second"])
        seconds["second_per_grid_ts"] = torch.tensor([settings["second_per_grid"]])
    with torch.device("meta"):
        model: Any = getattr(transformers, f"{name}Model")(config)
    prompt = torch.tensor([ids])
    kinds = (prompt == IMAGE).int() + 2 * (prompt == VIDEO).int()
    image = settings["image"]
    layout = torch.tensor([grid])
    positions, _ = model.get_rope_index(
        prompt,
        kinds,
        image_grid_thw=None if image is None else torch.tensor([[1, image[0], image[1]]]),
        video_grid_thw=layout,
        **seconds,
    )
    return positions[:, 0]


def whole_prompt(case: Case) -> tuple[list[int], Tensor]:
    """The ids of a case's prompt before the video was pruned, and the places of those that are left."""
    ids: list[int] = []
    rest, mask = iter(case.given["input_ids"].tolist()), case.expected["mask"].tolist()
    frames, each = case.settings["T"], len(mask) // case.settings["T"]
    left: list[int] = []
    runs = [mask] if case.settings["layout"] == "qwen2_5" else [mask[n * each : n * each + each] for n in range(frames)]
    following = next(rest, None)
    while following is not None:
        if following == VIDEO:
            run = runs.pop(0)
            left += [len(ids) + place for place, stays in enumerate(run) if stays]
            ids += [VIDEO] * len(run)
            for _ in range(sum(run)):
                following = next(rest, None)
        else:
            left.append(len(ids))
            ids.append(following)
            following = next(rest, None)
    return ids, torch.tensor(left)


@pytest.mark.parametrize("case", cases("evs"))
def test_original_positions_are_vllms(case: Case) -> None:
    """Kept tokens have the ids that transformers gave them, and so has the text behind them, but for what vLLM's
    Qwen2.5-VL takes off behind a picture that is taller than wide."""
    assert Evs().positions == "original"
    settings = case.settings
    ids, left = whole_prompt(case)
    found = transformers_positions(case, ids)[:, left]
    video = case.given["input_ids"] == VIDEO
    if settings["layout"] == "qwen2_5":
        behind = torch.arange(len(video)) > int(video.nonzero()[-1])
        taller = max(0, settings["H"] - settings["W"]) // settings["spatial_merge_size"]
        found = found - taller * behind
    assert found.equal(case.expected["positions"])
    assert int(found.max()) + 1 - len(left) == settings["position_delta"]


def mistaken(
    frames: Tensor,
    count: int,
    *,
    against_first: bool = False,
    protected: bool = True,
    extra: bool = False,
    euclidean: bool = False,
    most_alike: bool = False,
    equal: bool = False,
) -> list[int]:
    """The rule in plain loops; every setting but the default is a mistake."""
    before = frames[:1].expand_as(frames) if against_first else frames.roll(1, 0)
    change = (frames - before).norm(dim=-1) if euclidean else 1 - cosine_similarity(frames, before, dim=-1)
    change = -change if most_alike else change
    change[0] = torch.inf if protected else 0
    each = frames.shape[1]
    if equal:
        share = (count - each) // (len(frames) - 1)
        chosen = [*range(each)]
        for number in range(1, len(frames)):
            order = sorted(range(each), key=lambda place: -float(change[number, place]))
            chosen += [number * each + place for place in order[:share]]
        return sorted(chosen)
    flat = change.flatten().tolist()
    return sorted(sorted(range(len(flat)), key=lambda place: -flat[place])[: count + each * extra])


MISTAKES: dict[str, dict[str, Any]] = {
    "compared with the first frame": {"against_first": True},
    "first frame not protected": {"protected": False},
    "first frame on top of the count": {"extra": True},
    "euclidean distance": {"euclidean": True},
    "most similar kept": {"most_alike": True},
    "equal budget per frame instead of global": {"equal": True},
}


@pytest.mark.parametrize("case", cases("evs"))
def test_a_near_miss_keeps_others_where_that_is_recorded(case: Case) -> None:
    frames, count, q = video_of(case), case.settings["count"], case.settings["q"]
    expected, detects = case.expected["kept"].tolist(), case.about["detects"]
    assert mistaken(frames, count) == expected
    for mistake, settings in MISTAKES.items():
        if mistake in detects:
            assert mistaken(frames, count, **settings) != expected, mistake
    total, each = len(case.given["x"]), frames.shape[1]
    if "count rounded instead of floored" in detects:
        assert count == int(total * (1 - q)) == round(total * (1 - q)) - 1, "and with it the binary error of 1 - q"
    if "no floor of one frame" in detects:
        assert count == each > int(total * (1 - q))
    if "q read as the kept fraction" in detects:
        assert len(kept(Evs(q), frames)) != count


def unit(degrees: list[list[float]]) -> Tensor:
    turned = torch.tensor(degrees).deg2rad()
    return torch.stack([turned.cos(), turned.sin()], dim=-1)


EXAMPLE = unit([[0.0, 40.0, 90.0], [10.0, 100.0, 92.0], [80.0, 105.0, 180.0]])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1 - 0.3, [0, 1, 2, 4, 6, 8]),
        (1 - 0.4, [0, 1, 2, 6, 8]),  # of the second frame nothing
        (1 - 0.9, [0, 1, 2]),
        (4, [0, 1, 2, 8]),
        (1.0, [*range(9)]),
    ],
)
def test_worked_example(keep: int | float, expected: list[int]) -> None:
    assert kept(Evs(keep), EXAMPLE) == expected


@pytest.mark.parametrize(
    ("keep", "frames", "tokens", "expected"), [(1 - 0.9, 24, 5, 11), (0.1, 24, 5, 12), (7, 3, 9, 9)]
)
def test_counts_are_rounded_down_to_no_less_than_a_frame(
    keep: int | float, frames: int, tokens: int, expected: int
) -> None:
    assert len(kept(Evs(keep), random(frames, tokens, 6))) == expected


def test_of_equal_changes_the_first_stay_and_a_zero_is_like_nothing() -> None:
    frames = torch.ones(3, 4, 2)
    assert kept(Evs(6), frames) == [0, 1, 2, 3, 4, 5]
    frames[2, 3] = 0
    assert kept(Evs(5), frames) == [0, 1, 2, 3, 11]


def test_images_stay_whole() -> None:
    assert kept(Evs(1), torch.ones(1, 6, 4), role="whole") == [*range(6)]
    assert kept(Evs(1), torch.ones(3, 6, 4), role="crop") == [*range(18)]
