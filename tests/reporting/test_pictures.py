"""The picture of kept tokens: what is kept stands out, what is merged has one colour, and no model is needed."""

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
from tokenreduce.reporting.maps import TokenMap, token_maps
from tokenreduce.reporting.pictures import draw_kept_tokens, faded

from .made_up import SIDE, dropping, pooling, record, tiled


def cell(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    size = pixels.shape[0] // SIDE
    return pixels[row * size : (row + 1) * size, column * size : (column + 1) * size].reshape(-1, 3)


def map_of(steps: tuple[StepReduction, ...]) -> TokenMap:
    (tokens,) = token_maps(tiled(ImageReduction(Grid(SIDE, SIDE), steps)))
    return tokens


def test_kept_tokens_look_as_they_were_and_dropped_ones_are_faded() -> None:
    image = Image.new("RGB", (96, 96), (200, 30, 30))
    pixels = faded(image, map_of(dropping(range(12, 24))))
    assert np.allclose(cell(pixels, 1, 5), np.array([200, 30, 30]) / 255, atol=0.01)
    for row in (0, 2, 11):
        dropped = cell(pixels, row, 5)
        assert dropped.min() > 0.7
        assert np.ptp(dropped, axis=1).max() < 0.2


def test_merged_tokens_share_their_groups_colour() -> None:
    tokens = map_of(pooling())
    assert tokens.kept.all()
    assert tokens.groups is not None
    assert len(np.unique(tokens.groups)) == 36
    pixels = faded(Image.new("RGB", (96, 96), (100, 100, 100)), tokens)
    assert np.allclose(cell(pixels, 0, 0), cell(pixels, 1, 1))
    assert not np.allclose(cell(pixels, 0, 0), cell(pixels, 0, 2))


def test_plain_dropping_has_no_groups_and_no_steps_keep_all() -> None:
    assert map_of(dropping(range(5))).groups is None
    whole = map_of(())
    assert whole.kept.all()
    assert whole.groups is None


@pytest.mark.parametrize("kind", ["dropping", "pooling", "no_image", "unreduced"])
def test_a_picture_is_drawn_of_any_reducer(kind: str, scenes: Scenes, unreduced: list[Record], tmp_path: Path) -> None:
    nothing = (StepReduction("input", (), (-1,) * SIDE * SIDE),)
    steps = {"dropping": dropping(range(36)), "pooling": pooling(), "no_image": nothing, "unreduced": ()}[kind]
    records = [record(scenes, index, steps, right=False) for index in range(len(scenes))]
    path = tmp_path / "figures" / "kept.png"
    assert draw_kept_tokens(scenes, records, unreduced, path, name=kind, title=kind, count=2)
    with Image.open(path) as picture:
        assert min(picture.size) > 500
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_every_category_gets_its_turn_and_every_picture_another_image(
    scenes: Scenes, reduced: list[Record], unreduced: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    images = Scenes.images
    monkeypatch.setattr(Scenes, "images", lambda self, sample: shown.append(sample.id) or images(self, sample))  # type: ignore[func-returns-value]
    draw_kept_tokens(scenes, reduced, unreduced, tmp_path / "kept.png", name="x", title="x", count=5)
    assert len({each.rsplit("-", 1)[0] for each in shown}) == 5
    assert len({each.rsplit("-", 1)[1] for each in shown}) == 5


def test_samples_without_an_answer_are_not_drawn(scenes: Scenes, reduced: list[Record], tmp_path: Path) -> None:
    failed = [replace(each, error="broken", images=()) for each in reduced]
    assert not draw_kept_tokens(scenes, failed, [], tmp_path / "kept.png", name="x", title="x")
    assert not draw_kept_tokens(scenes, reduced, [], tmp_path / "kept.png", name="x", title="x", count=0)
    assert not (tmp_path / "kept.png").exists()
