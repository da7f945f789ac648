"""CenterCLIP's medoids are those of the worked example, and those that a plain loop finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import create
from tokenreduce.testing import check_reducer, prompts
from tokenreduce_plugins.centerclip import CenterClip, spread

from .golden import GEOMETRY, assert_equal_floats, random, show
from .videos import show_film

POINTS = torch.tensor([[0, 0], [0, 1], [4, 0], [4, 1], [5, 0.5], [0.2, 0.4]])


def test_worked_example() -> None:
    """The start is 4, the longest, and 0, the farthest from it; the medoids are then 2 and 5."""
    assert spread(POINTS, torch.cdist(POINTS, POINTS), 2).tolist() == [4, 0]
    medoids, cluster = CenterClip().clustered(POINTS, 2)
    assert medoids.tolist() == [2, 5] and cluster.tolist() == [1, 1, 0, 0, 0, 1]
    reducer = CenterClip(2, aggregation="mean")
    selection = show(reducer, reducer.steps(GEOMETRY)[0], POINTS)
    assert selection.index.tolist() == [2, 5] and selection.features is not None
    assert_equal_floats(selection.features, torch.tensor([[13 / 3, 0.5], [0.2 / 3, 1.4 / 3]]))


def loop(distances: list[list[float]], first: int, count: int) -> list[int]:
    """k-medoids in plain Python."""
    places, medoids = range(len(distances)), [first]
    while len(medoids) < count:
        others = (place for place in places if place not in medoids)
        medoids.append(max(others, key=lambda place: min(distances[place][medoid] for medoid in medoids)))
    for _ in range(100):
        own = [min((distances[place][medoid], each) for each, medoid in enumerate(medoids))[1] for place in places]
        moved = []
        for each in range(count):
            members = [place for place in places if own[place] == each]
            moved.append(min((sum(distances[place][other] for other in members), place) for place in members)[1])
        if moved == medoids:
            break
        medoids = moved
    return sorted(medoids)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("size", "count"), [(30, 4), (40, 13), (25, 24), (9, 1)])
def test_as_a_plain_loop(metric: str, size: int, count: int) -> None:
    points = random(size, 5, seed=size)
    unit = torch.nn.functional.normalize(points, dim=-1)
    distances: Tensor = torch.cdist(points, points) if metric == "euclidean" else 1 - unit @ unit.T
    found, _ = CenterClip(metric=metric).clustered(points, count)
    assert found.tolist() == loop(distances.tolist(), int(points.norm(dim=-1).argmax()), count)


def test_every_segment_is_clustered_alone_and_the_last_may_be_shorter() -> None:
    """Five frames in three segments are two, two and one: of 15 tokens, 6, 6 and 3 are kept by their sizes."""
    features, reducer = random(5, 6, 4), CenterClip(15, segments=3)
    index = show_film(reducer, reducer.steps(GEOMETRY)[0], features).index
    assert [int(((index >= low) & (index < high)).sum()) for low, high in ((0, 12), (12, 24), (24, 30))] == [6, 6, 3]
    alone, _ = reducer.clustered(features[2:4].flatten(0, 1), 6)
    assert (alone + 12).tolist() == index[6:12].tolist()


def test_equal_tokens_and_everything() -> None:
    reducer = CenterClip(3)
    assert len(set(show(reducer, reducer.steps(GEOMETRY)[0], torch.ones(5, 2)).index.tolist())) == 3
    whole = CenterClip(1.0)
    assert show_film(whole, whole.steps(GEOMETRY)[0], random(4, 6, 3)).index.tolist() == list(range(24))


def test_settings_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="segments=0, iterations=100: both must be at least 1"):
        CenterClip(segments=0)


@pytest.mark.parametrize("aggregation", ["medoid", "mean"])
def test_in_a_model(llava: LlavaForConditionalGeneration, aggregation: str) -> None:
    check_reducer(CenterClip(0.3, aggregation=aggregation), llava, prompts(llava, [1, 2]))


def test_presets() -> None:
    assert create("centerclip_3") == CenterClip(147, segments=3)
