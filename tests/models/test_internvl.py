"""InternVL: which tiles an image has, and which patches a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tokenreduce.models.internvl import InternVL
from tokenreduce.models.loading import load
from tokenreduce.testing.checkpoints import ask, picture, video

Checkpoint = Callable[[str], Path]


def test_images_of_one_prompt_are_told_apart(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("internvl")))
    shapes = [(60, 60), (30, 90), (32, 32)]
    alone = [len(InternVL(model).pictures(ask(processor, [[picture(0, *shape)]]))[0].tiles) for shape in shapes]
    images = [picture(0, *shape) for shape in shapes]
    together = InternVL(model).pictures(ask(processor, [[], images, images[:1]]))
    assert [len(each.tiles) for each in together] == [*alone, 5]
    tiles = [tile.sequence for each in together for tile in each.tiles]
    assert tiles == list(range(sum(alone) + 5))


def test_frames_of_a_video_are_images(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("internvl")))
    inputs = ask(processor, [[picture(0, 32, 32)], []], [[], [video(1, 3, 30, 30)]])
    assert [len(each.tiles) for each in InternVL(model).pictures(inputs)] == [1] * 4


def test_patches_are_those_that_the_model_puts_together(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("internvl")))
    inputs = ask(processor, [[picture(0, 30, 90)], [picture(1, 60, 60), picture(2, 30, 30)]])
    served = InternVL(model)
    hidden = model.model.get_image_features(inputs["pixel_values"], return_dict=True).last_hidden_state[:, 1:]
    for (features,), each in zip(served.encode(inputs), served.pictures(inputs), strict=True):
        rows = [hidden[tile.sequence][tile.patches].flatten(1) for tile in each.tiles]
        torch.testing.assert_close(model.model.multi_modal_projector(torch.cat(rows)), features)
