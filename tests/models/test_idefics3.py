"""Idefics3 and SmolVLM: which tiles an image has, and which patches a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenreduce.models.idefics3 import Idefics3
from tokenreduce.models.loading import load
from tokenreduce.testing.checkpoints import ask, picture, video

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_images_of_one_prompt_are_told_apart(family: str, checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint(family)))
    shapes = [(60, 60), (30, 90), (90, 30), (20, 20)]
    alone = [len(Idefics3(model).pictures(ask(processor, [[picture(0, *shape)]]))[0].tiles) for shape in shapes]
    images = [picture(0, *shape) for shape in shapes]
    assert [len(p.tiles) for p in Idefics3(model).pictures(ask(processor, [[], images, images[:1]]))] == [*alone, 5]
    text = "<image>" * len(images)  # with nothing between them
    adjacent = processor(text=[text], images=[images], return_tensors="pt")
    assert [len(each.tiles) for each in Idefics3(model).pictures(adjacent)] == alone
    whole = processor(text=[text], images=[images], return_tensors="pt", do_image_splitting=False)
    assert [len(each.tiles) for each in Idefics3(model).pictures(whole)] == [1, 1, 1, 1]


def test_frames_of_a_video_are_images(checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint("smolvlm")))
    inputs = ask(processor, [[], []], [[video(0, 3, 30, 30)], [video(1, 3, 30, 30)]])
    assert [len(each.tiles) for each in Idefics3(model).pictures(inputs)] == [1] * 6


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_patches_are_those_that_the_connector_puts_together(family: str, checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint(family)))
    inputs = ask(processor, [[picture(0, 30, 90)], [picture(1, 60, 60), picture(2, 30, 30)]])
    served = Idefics3(model)
    encoded = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
    project = model.model.connector.modality_projection
    for (features,), each in zip(served.encode(inputs), served.pictures(inputs), strict=True):
        rows = [encoded.last_hidden_state[tile.sequence][tile.patches].flatten(1) for tile in each.tiles]
        torch.testing.assert_close(project(torch.cat(rows)), features)
