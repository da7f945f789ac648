"""HoliTom makes of a video what the official code makes of it, and inside the language model what its loop would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import Geometry, Grid, Span, Tile, VisualTokens, density_peaks
from tokenreduce.testing import check_reducer, prompts
from tokenreduce_plugins.holitom import HoliTom, averaged, static_windows

from .golden import GEOMETRY, Case, assert_equal_floats, cases, random, show
from .videos import film, received, show_film


def outer(features: Tensor, scores: Tensor, *args: Any, **knobs: Any) -> Any:
    reducer = HoliTom(*args, **knobs)
    step = reducer.steps(GEOMETRY)[0]
    return show_film(reducer, step, features, {step.sees[0]: received(scores)})


def settings(case: Case) -> dict[str, Any]:
    names = {"keep": "retain_ratio", "tau": "tau", "beta": "beta", "neighbours": "K", "window": "window"}
    return {ours: case.settings[name] for ours, name in names.items()}


@pytest.mark.parametrize("case", cases("holitom_outer"))
def test_official_vectors(case: Case) -> None:
    features, scores = case.given["features"], case.given["attn"]
    selection = outer(features, scores, **settings(case))
    assert_equal_floats(selection.features, case.expected["tokens"])
    still = torch.cosine_similarity(features[:-1], features[1:], dim=-1) > case.settings["tau"]
    segments, saved = static_windows(still, case.settings["window"])
    assert segments == [tuple(segment) for segment in case.expected["segments"].tolist()]
    assert saved == int(case.expected["total_reduced"])
    frame, counts = selection.index // features.shape[1], case.expected["tokens_per_segment"].tolist()
    assert [int(((frame >= first) & (frame <= last)).sum()) for first, last in segments] == counts
    assert set(selection.source.tolist()) - {-1} == set(range(len(selection.index)))
    assert selection.source[selection.index].equal(torch.arange(len(selection.index)))


MISTAKES: dict[str, dict[str, Any]] = {
    "plain means": {"beta": None},
    "beta 0.5": {"beta": 0.5},
    "pairs of frames only": {"window": 2},
    "a lower tau": {"tau": 0.3},
    "the nearest one only": {"neighbours": 1},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_vectors_tell_mistakes_apart(mistake: str) -> None:
    differing = 0
    for case in (parameters.values[0] for parameters in cases("holitom_outer")):
        wrong = outer(case.given["features"], case.given["attn"], **{**settings(case), **MISTAKES[mistake]}).features
        expected = case.expected["tokens"]
        differing += wrong.shape != expected.shape or not torch.allclose(wrong, expected, atol=2e-5, rtol=1e-4)
    assert differing


STILL = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def turning(still: Tensor) -> Tensor:
    """Directions (frames, n, 2) that turn by a right angle between frames where a token does not stand still."""
    degrees = torch.cat([torch.zeros(1, still.shape[1]), torch.where(still, 3.0, 90.0)]).cumsum(dim=0)
    angles = torch.deg2rad(degrees + 7 * torch.arange(still.shape[1]))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_worked_example() -> None:
    """Five frames of four tokens: 8 are saved, so 0.4 of all is 2/3 of what is left: 1 + 3 * 2 and 3 rows."""
    assert static_windows(STILL, 1024) == ([(0, 2), (3, 4)], 8)
    selection = outer(turning(STILL), random(5, 4).abs(), keep=0.4)
    frames = (selection.index // 4).tolist()
    assert frames == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert sorted(set((selection.index % 4).tolist()[1:7])) == [2, 3], "what moves"
    assert set(selection.source.view(5, 4)[:3, :2].flatten().tolist()) == {0}, "both of three frames are in one row"


def test_of_equally_good_stretches_the_shorter_last_one_counts() -> None:
    """Either pair of three frames saves 2, and so do all three: the last one is then alone."""
    pairs = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert static_windows(pairs, 1024) == ([(0, 1), (2, 2)], 2)
    assert static_windows(torch.ones(5, 2, dtype=torch.bool), 3) == ([(0, 2), (3, 5)], 8)
    assert static_windows(torch.zeros(2, 4, dtype=torch.bool), 1024) == ([(0, 0), (1, 1), (2, 2)], 0)


def test_as_many_neighbours_as_clusters_make_the_density() -> None:
    """Three centres, so the two nearest others count; of all six points 2, 3 and 4 would be the centres."""
    points = torch.tensor([0.0, 1, 3, 5, 8, 11])[:, None] / 4
    centres, cluster = density_peaks(points, 3, neighbours=7)
    assert centres.tolist() == [1, 2, 4] and cluster.tolist() == [0, 0, 1, 1, 2, 2]
    distances = (points - points.T).abs()
    density = (-distances.square().mean(dim=1)).exp()
    separation = distances.where(density > density[:, None], distances.max()).amin(dim=1)
    assert sorted((density * separation).topk(3).indices.tolist()) == [2, 3, 4]


@pytest.mark.parametrize(("beta", "expected"), [(0.6, [0.8, 0.4]), (None, [2 / 3, 2 / 3])])
def test_a_cluster_is_its_centre_and_the_mean_of_the_others(beta: float | None, expected: list[float]) -> None:
    points = torch.tensor([[1.0, 0], [0, 1], [1, 1], [5, 5]])
    rows = HoliTom(beta=beta).merged(points, torch.tensor([0, 3]), torch.tensor([0, 0, 0, 1]))
    assert_equal_floats(rows, torch.tensor([expected, [5.0, 5.0]]))


def test_what_moves_is_counted_up_and_clusters_half_to_even() -> None:
    """Ten tokens, five of which stand still over two frames: 0.3 / (15/20) = 0.4 of them are 2, and of the others 2."""
    still = torch.arange(10)[None] < 5
    index = outer(turning(still), random(2, 10).abs(), keep=0.3).index
    assert (index // 10).tolist() == [0, 0, 0, 0, 1, 1]
    index = outer(turning(still), random(2, 10).abs(), keep=0.3375).index  # 0.45: 2.25 are 2 clusters, and 3 that move
    assert (index // 10).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    index = outer(turning(still), random(2, 10).abs(), keep=0.375).index  # 0.5: 2.5 are 2 clusters
    assert (index // 10).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_an_image_keeps_what_receives_most_attention() -> None:
    reducer = HoliTom(0.3)
    step, scores = reducer.steps(GEOMETRY)[0], torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3, 0.0]])
    selection = show(reducer, step, random(6, 3), {step.sees[0]: received(scores)[0]})
    assert selection.index.tolist() == [1, 3] and selection.features is None


def test_parts_of_an_image_are_frames_apart() -> None:
    reducer = HoliTom(3)
    step, tiles = reducer.steps(GEOMETRY)[0], (Tile(Grid(1, 2), role="thumbnail"), Tile(Grid(2, 2), role="crop"))
    span = Span(GEOMETRY, tiles, 6, 6)
    assert reducer.count(step, span) == 3
    views = [received(torch.tensor([scores]))[0] for scores in ([0.2, 0.8], [0.9, 0.1, 0.2, 0.7])]
    tile = torch.tensor([0, 0, 1, 1, 1, 1])
    tokens = VisualTokens(random(6, 3), span, 3, tile=tile, signals=lambda signal: views)
    assert reducer.select(step, tokens).index.tolist() == [1, 2, 5]


def test_everything_and_almost_nothing_can_be_kept() -> None:
    features, scores = turning(torch.ones(3, 4, dtype=torch.bool)), random(4, 4).abs()
    assert outer(features, scores, keep=1.0).index.tolist() == [0, 1, 2, 3], "one row for what stands still"
    assert outer(features, scores, keep=0.01).index.tolist() == [], "0.16 clusters are none"
    moving = turning(torch.zeros(3, 4, dtype=torch.bool))
    assert sorted(outer(moving, scores, keep=1.0).index.tolist()) == list(range(16))
    assert len(outer(moving, scores, keep=0.01).index) == 4


def test_a_number_is_of_the_whole_video() -> None:
    reducer, scores = HoliTom(8), random(4, 4).abs()
    assert len(outer(turning(torch.zeros(3, 4, dtype=torch.bool)), scores, keep=8).index) == 8
    assert reducer.count(reducer.steps(GEOMETRY)[0], film(4, 4)) == (0, 13)


# Inside the language model.


def test_a_later_token_weighs_more() -> None:
    """8 with 4 and then 2 is 4, where a mean would be 4.67; the fourth one is like another kept one."""
    states = torch.tensor([[4.0, 0], [8, 0], [2, 0], [0, 6], [0, 1]])
    selection = averaged(states, torch.tensor([1, 3]))
    assert selection.index.tolist() == [1, 3] and selection.source.tolist() == [0, 0, 0, 1, 1]
    assert_equal_floats(selection.features, torch.tensor([[4.0, 0], [0, 3.5]]))


@pytest.mark.parametrize("kept", [[0], [2, 5], [1, 4, 7, 11], list(range(12))])
def test_as_a_loop_over_the_dropped_tokens(kept: list[int]) -> None:
    states, merged = random(12, 4), random(12, 4)
    for place in (each for each in range(12) if each not in kept):
        into = max(kept, key=lambda other: float(torch.cosine_similarity(states[place], states[other], dim=0)))
        merged[into] = (merged[into] + merged[place]) / 2
    assert_equal_floats(averaged(states, torch.tensor(kept)).features, merged[kept])


def test_the_inner_part() -> None:
    geometry = Geometry(encoder_layers=4, decoder_layers=28, feature_layer=3, class_token=False)
    outside, inside = HoliTom().steps(geometry)
    assert inside.decoder_layer(geometry) == 18 and inside.sees[0].layer == 17
    assert outside.sees[0].layer == 3
    assert HoliTom().positions_after(outside) == "compact" and HoliTom().positions_after(inside) == "original"
    rounded = [HoliTom().count(inside, Span(geometry, (Tile(Grid(1, n)),), n, n)) for n in (5, 6, 7)]
    assert rounded == [2, 3, 4], "half to even"
    assert [step.stage for step in HoliTom(layer=None).steps(geometry)] == [0]


def test_in_a_model(llava: LlavaForConditionalGeneration) -> None:
    inputs = prompts(llava, [1, 2])
    check_reducer(HoliTom(0.5, layer=2), llava, inputs)
    with torch.no_grad(), reduce_tokens(llava, HoliTom(0.5, layer=2)) as reduction:
        llava(**inputs)
    assert [len(image.kept) for image in reduction.samples[0].images] == [9]


@pytest.mark.parametrize(("preset", "keep", "tau"), [("r10", 0.1, 0.65), ("r15", 0.15, 0.8), ("r25", 0.25, 0.8)])
def test_presets(preset: str, keep: float, tau: float) -> None:
    assert create(f"holitom_{preset}") == HoliTom(keep, tau=tau)
