"""Every whole picture and frame of a sample is shown, and what was merged over several of them is one group in all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenreduce.attach import ImageReduction, StepReduction
from tokenreduce.benchmarks.scenes import Scenes
from tokenreduce.evaluation.records import Record
from tokenreduce.reducer import Grid
from tokenreduce.reporting.discovery import Comparison
from tokenreduce.reporting.gallery import gallery
from tokenreduce.reporting.maps import Place, sheet, spaced, token_maps
from tokenreduce.reporting.pictures import draw_kept_tokens
from tokenreduce.reporting.study import studies

from .made_up import SIDE, dropping, method, record, result, tiled

DROPPED = StepReduction("projector", index=(0, 2), source=(0, -1, 1))
MERGED = StepReduction("projector", index=(2,), source=(1, -1, 0), merged=True, into=(0, 1, 1))
"""The first token went into the first frame's second row, the last one is a row of its own."""
GONE = StepReduction("projector", index=(), source=(-1, 0, 1), merged=True, into=(2, 1, 0))
"""One token went into the second frame's row, one into the first frame's second."""

FRAMES = tuple(
    ImageReduction(Grid(1, 3), (step,), role="frame", time=number / 2)
    for number, step in enumerate((DROPPED, MERGED, GONE))
)


def test_a_row_of_several_frames_is_one_group_in_all_of_them() -> None:
    first, second, third = token_maps(tiled(*FRAMES))
    assert [tokens.time for tokens in (first, second, third)] == [0.0, 0.5, 1.0]
    assert first.groups is not None and second.groups is not None and third.groups is not None
    assert first.groups.tolist() == [[0, -1, 1]]
    assert second.groups.tolist() == [[1, -1, 2]], "the first frame's second row, and one that is no other frame's"
    assert third.groups.tolist() == [[-1, 2, 1]]
    assert third.kept.tolist() == [[False, True, True]]


def test_a_row_that_stands_for_no_token_is_a_group_as_well() -> None:
    """Such as a class token: it is in no tile, and may take tokens of several."""
    step = StepReduction("projector", index=(-1, 1), source=(0, 1), merged=True, into=(-1, 0))
    other = StepReduction("projector", index=(), source=(0, -1), merged=True, into=(-1, -1))
    first, second = token_maps(tiled(ImageReduction(Grid(1, 2), (step,)), ImageReduction(Grid(1, 2), (other,))))
    assert first.groups is not None and second.groups is not None
    assert first.groups.tolist() == [[2, 1]]
    assert second.groups.tolist() == [[2, -1]]


def test_frames_stand_in_the_order_of_time_and_pictures_in_theirs() -> None:
    late, early = replace(FRAMES[0], time=2.0, picture=1), replace(FRAMES[0], time=1.0, picture=1)
    other = ImageReduction(Grid(2, 3))
    shown = token_maps(tiled(late, other, early))
    assert [(tokens.rows, tokens.time) for tokens in shown] == [(2, None), (1, 1.0), (1, 2.0)]


def test_of_a_picture_in_crops_the_tile_that_shows_all_of_it_is_shown() -> None:
    whole = ImageReduction(Grid(SIDE, SIDE), dropping(range(4)), role="thumbnail")
    crop = replace(whole, role="crop", grid=Grid(SIDE, SIDE))
    (tokens,) = token_maps(tiled(crop, whole, crop))
    assert tokens.kept.sum() == 4
    assert token_maps(tiled(crop)) == []


def test_tokens_that_have_no_place_in_the_grid_are_not_shown() -> None:
    assert token_maps(tiled(ImageReduction(Grid(SIDE, SIDE), dropping(range(4)))))
    assert not token_maps(tiled(ImageReduction(Grid(SIDE, SIDE + 1), dropping(range(4)))))


def test_tiles_stand_side_by_side_and_long_videos_are_sampled() -> None:
    assert sheet([0.5]) == ([Place(0.0, 0.0, 1.0, 0.5)], 0.5)
    places, height = sheet([1.0] * 6)
    assert [place.x for place in places[:2]] == [place.x for place in places[4:]]
    assert places[3].x + places[3].width == pytest.approx(1)
    assert height == pytest.approx(2.04 * places[0].width)
    assert spaced(3) == [0, 1, 2] and spaced(15) == [0, 2, 4, 6, 8, 10, 12, 14]


class Films(Scenes):
    """Three frames a question, of one colour each."""

    def images(self, sample: object) -> list[Image.Image]:
        return [Image.new("RGB", (30, 10), color) for color in ("red", "green", "blue")]


def filmed(number: int, steps: bool) -> Record:
    tiles = FRAMES if steps else tuple(replace(each, steps=()) for each in FRAMES)
    return replace(record(Scenes(count=1), number, (), right=True), images=tiles)


def test_a_film_is_a_strip_in_the_run_and_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, reduced = [filmed(0, steps=False)], [filmed(0, steps=True)]
    assert draw_kept_tokens(Films(count=1), reduced, plain, tmp_path / "kept.png", name="x", title="x")
    with Image.open(tmp_path / "kept.png") as picture:
        colors = {tuple(color) for color in np.asarray(picture.convert("RGB").resize((370, 530))).reshape(-1, 3)}
    assert any(red > 150 > 90 > max(green, blue) for red, green, blue in colors), "the first frame's kept tokens"
    assert any(green > 90 > 80 > max(red, blue) for red, green, blue in colors), "the second frame's"

    monkeypatch.setattr("tokenreduce.reporting.gallery._benchmark", lambda _: Films(count=1))
    found = result("best", {"unreduced": method("none", 1, 1.0, 9), "reducer": method("best", 1, 1.0, 3)})
    comparison = Comparison(tmp_path, found, {}, {"unreduced": [_by_id(plain)], "reducer": [_by_id(reduced)]})
    (study,) = studies([comparison])
    (drawn,) = gallery(study, [plain[0].id])
    (kept,) = drawn.kept
    assert drawn.picture is not None and len(kept.layers) == 3
    assert kept.layers[1].dropped == "M1 0h1v1h-1z"
    assert [sorted(layer.tints) for layer in kept.layers] == [[0, 1], [1, 2], [1, 2]]


def _by_id(records: list[Record]) -> dict[str, Record]:
    return {each.id: each for each in records}
