"""What tiles say of themselves: what they show, where they lie in their picture, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenreduce.models.family import Picture, family_of
from tokenreduce.models.loading import load
from tokenreduce.registry import MODELS
from tokenreduce.testing.checkpoints import ask, picture, recipes, video

Checkpoint = Callable[[str], Path]
CUT_UP = ("idefics3", "internvl", "llava_next", "llava_next_video", "llava_onevision", "smolvlm")


def slope(height: int, width: int) -> Image.Image:
    """A picture that becomes redder to the right and greener to the bottom."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", CUT_UP)
@pytest.mark.parametrize("shape", [(64, 64), (32, 64), (64, 32), (32, 96), (96, 32), (32, 128), (128, 32)], ids=str)
def test_crops_lie_where_they_show_their_picture(name: str, shape: tuple[int, int], checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint(name)))
    family = family_of(model, MODELS.usable())
    (shown,) = family.pictures(ask(processor, [[slope(*shape)]]))
    thumbnails = [tile for tile in shown.tiles if tile.role == "thumbnail"]
    crops = [(tile, pixels) for tile, pixels in zip(shown.tiles, shown.pixels, strict=True) if tile.role == "crop"]
    assert [(tile.row, tile.column) for tile in thumbnails] == [(0, 0)]
    assert len(crops) == len(shown.tiles) - 1 > 1
    cells = [
        (tile.row + row, tile.column + column)
        for tile, _ in crops
        for row in range(tile.grid.height)
        for column in range(tile.grid.width)
    ]
    height, width = (max(axis) + 1 for axis in zip(*cells, strict=True))
    assert sorted(cells) == [(row, column) for row in range(height) for column in range(width)]
    assert (height > width, height < width) == (shape[0] > shape[1], shape[0] < shape[1])
    for one, first in crops:
        for other, second in crops:
            redder, greener = (float((first[colour] - second[colour]).mean()) for colour in (0, 1))
            assert (one.column > other.column) == (redder > 0.1)
            assert (one.row > other.row) == (greener > 0.1)


@pytest.mark.parametrize("name", [name for name in recipes() if name not in CUT_UP])
def test_a_picture_that_is_not_cut_up_is_whole(name: str, checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint(name)), attention=recipes()[name].attention)
    shown = family_of(model, MODELS.usable()).pictures(ask(processor, [[picture(0, 30, 90), picture(1, 50, 50)]]))
    assert [described(each) for each in shown] == [[("whole", 0, 0, None)]] * 2


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm"])
def test_a_small_picture_is_whole(name: str, checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint(name)))
    inputs = ask(processor, [[picture(0, 20, 20)]])
    if name != "internvl":
        inputs = processor(
            text=["<image>"], images=[[picture(0, 20, 20)]], return_tensors="pt", do_image_splitting=False
        )
    (shown,) = family_of(model, MODELS.usable()).pictures(inputs)
    assert described(shown) == [("whole", 0, 0, None)]


@pytest.mark.parametrize("name", [name for name, recipe in recipes().items() if recipe.frames])
def test_frames_of_a_video_are_told_from_pictures(name: str, checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint(name)))
    family = family_of(model, MODELS.usable())
    inputs = ask(processor, [[], []], [[video(0, 4, 40, 60)], [video(1, 4, 40, 60)]])
    shown = family.pictures(inputs)
    if "video" not in family.placeholders:  # frames are pictures to it
        assert [described(each) for each in shown] == [[("whole", 0, 0, None)]] * 8
        return
    frames = 2 if name.startswith("qwen") else 4  # Qwen's towers take pairs of them
    times: list[float | None] = [None] * frames
    if name == "qwen2_5_vl":
        times = [number * float(inputs["second_per_grid_ts"][0]) for number in range(frames)]
    assert [each.modality for each in shown] == ["video", "video"]
    assert [described(each) for each in shown] == [[("frame", 0, 0, time) for time in times]] * 2


def test_a_frame_has_the_second_that_the_model_is_told(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("qwen2_5_vl")))
    content = [{"type": "video"}, {"type": "image"}, {"type": "video"}]
    inputs = processor(
        text=[processor.apply_chat_template([{"role": "user", "content": content}])],
        images=[picture(0, 32, 32)],
        videos=[video(0, 6, 32, 32), video(1, 4, 32, 32)],
        video_metadata=[{"fps": 4.0}, {"fps": 0.5}],
        return_tensors="pt",
    )
    image, *videos = family_of(model, MODELS.usable()).pictures(inputs)
    assert described(image) == [("whole", 0, 0, None)]
    assert [[tile.time for tile in each.tiles] for each in videos] == [[0.0, 0.5, 1.0], [0.0, 4.0]]
    del inputs["second_per_grid_ts"]
    assert {tile.time for each in family_of(model, MODELS.usable()).pictures(inputs) for tile in each.tiles} == {None}


def described(shown: Picture) -> list[tuple[Any, ...]]:
    return [(tile.role, tile.row, tile.column, tile.time) for tile in shown.tiles]
