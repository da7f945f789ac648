"""Processors: without torchvision too they prepare what the model expects, videos included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from tokenreduce.models.processing import processor_of
from tokenreduce.testing.checkpoints import ask, picture, recipes, video

pytestmark = pytest.mark.skipif(is_torchvision_available(), reason="transformers' own video processors are used then")
Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_video_patch_spans_consecutive_frames(family: str, checkpoint: Checkpoint) -> None:
    """Against the layout written out: time, place in windows of 2 x 2, then channel, moment and pixels."""
    processor = processor_of(checkpoint(family))
    frames = video(0, 3, 32, 64)
    inputs = ask(processor, [[]], [[frames]])
    times, rows, columns = inputs["video_grid_thw"][0].tolist()
    smaller = [
        np.asarray(Image.fromarray(frame).resize((columns * 8, rows * 8), Image.Resampling.BICUBIC)) for frame in frames
    ]
    mean, std = (np.array(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    pixels = (np.stack([*smaller, smaller[-1]]) / 255 - mean) / std  # an odd last frame is shown twice
    patches = torch.from_numpy(pixels).reshape(times, 2, rows // 2, 2, 8, columns // 2, 2, 8, 3)
    expected = patches.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(times * rows * columns, -1)
    torch.testing.assert_close(inputs["pixel_values_videos"], expected.float(), rtol=0, atol=1e-5)
    assert times == 2
    assert int((inputs["mm_token_type_ids"] == 2).sum()) == times * rows * columns // 4


def test_pixel_bounds_are_a_frames_or_a_videos(checkpoint: Checkpoint) -> None:
    def tokens_per_moment(family: str, frames: int) -> int:
        grid = ask(processor_of(checkpoint(family)), [[]], [[video(0, frames, 64, 64)]])["video_grid_thw"][0]
        return int(grid[1:].prod()) // 4

    assert tokens_per_moment("qwen2_5_vl", 2) == tokens_per_moment("qwen2_5_vl", 8)
    assert tokens_per_moment("qwen3_vl", 2) > tokens_per_moment("qwen3_vl", 8)


def test_the_frame_rate_reaches_the_model(checkpoint: Checkpoint) -> None:
    processor = processor_of(checkpoint("qwen2_5_vl"))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    told = processor(text=[text], videos=[video(0, 4, 32, 32)], video_metadata=[{"fps": 8.0}], return_tensors="pt")
    assert told["second_per_grid_ts"] == pytest.approx(2 / 8)


def test_what_cannot_be_prepared_is_refused(checkpoint: Checkpoint) -> None:
    processor = processor_of(checkpoint("llava_onevision"))
    with pytest.raises(ValueError, match=r"\[2, 3\] frames"):
        ask(processor, [[], []], [[video(0, 2, 32, 32)], [video(0, 3, 32, 32)]])
    with pytest.raises(ValueError, match="sample the frames first"):
        processor(text=["<video>"], videos=[video(0, 2, 32, 32)], do_sample_frames=True)


@pytest.mark.parametrize("family", [name for name, recipe in recipes().items() if recipe.frames])
def test_settings_survive_saving(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    processor = processor_of(checkpoint(family))
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint(family) / "config.json").read_bytes())
    again = processor_of(tmp_path)
    assert json.loads(again.video_processor.to_json_string()) == dict(recipes()[family].frames)
    pictures = [[picture(0, 40, 60)], [picture(1, 60, 40)]]
    for name, value in ask(processor, pictures).items():
        torch.testing.assert_close(ask(again, pictures)[name], value, rtol=0, atol=0)
