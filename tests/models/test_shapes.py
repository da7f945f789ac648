"""Pictures of any shape: keeping everything changes nothing, however wide or tall a picture is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenreduce import reduce_tokens
from tokenreduce.models.family import family_of
from tokenreduce.models.loading import load
from tokenreduce.reducer import AtDecoder, AtEncoderOutput, AtProjector, Step
from tokenreduce.registry import MODELS
from tokenreduce.testing import Identity
from tokenreduce.testing.checkpoints import ask, picture

Checkpoint = Callable[[str], Path]
FAMILIES = (
    "idefics3",
    "internvl",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
)
"""Those whose pictures keep something of their shape."""
SITES: tuple[Step, ...] = (AtEncoderOutput(keep=1.0), AtProjector(keep=1.0), AtDecoder(layer=1, keep=1.0))
EXTREME = ((8, 400), (400, 8), (1, 300), (300, 1), (2, 2), (1, 1), (16, 1000), (1000, 16), (33, 32), (97, 32), (31, 97))
"""Height and width. In the padding of some of these lie whole lines of a tile grid but for their newlines."""


def shapes() -> Iterator[tuple[int, int]]:
    """The extreme ones, and some drawn at random, sides evenly by their logarithm."""
    yield from EXTREME
    draw = random.Random(0)
    for _ in range(12):
        height, width = (round(2 ** draw.uniform(1, 9)) for _ in range(2))
        yield height, width


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES])
def test_keeping_everything_of_any_shape_is_bit_identical(name: str, checkpoint: Checkpoint) -> None:
    model, processor = load(str(checkpoint(name)))
    assert len([shape for shape in shapes() if kept_whole(model, processor, shape)]) > 15


@pytest.mark.parametrize("most", [1, 4, 9])
def test_keeping_everything_of_pictures_shrunk_by_any_ratio_is_bit_identical(most: int, checkpoint: Checkpoint) -> None:
    """With tile grids of up to 6 x 6, of which as many tokens are made as ``most`` tiles have."""
    model, processor = load(str(checkpoint("llava_onevision")))
    grids = [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]
    pinpoints = [[32 * rows, 32 * columns] for rows, columns in grids if rows * columns <= 9 or rows * columns > 30]
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = pinpoints
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = f"anyres_max_{most}"
    for shape in [(361, 108), (300, 280), (90, 330), *EXTREME]:
        assert kept_whole(model, processor, shape)


def kept_whole(model: Any, processor: Any, shape: tuple[int, int]) -> bool:
    """Hold the model to its own logits for a picture of that shape, at every site that it hosts; false where the
    family's own processor takes no such picture."""
    try:
        inputs = ask(processor, [[picture(sum(shape), *shape)]])
    except ValueError:
        return False
    family = family_of(model, MODELS.usable())
    with torch.no_grad():
        plain = model(**inputs).logits
        for site in SITES:
            if family.hosts(type(site)):
                with reduce_tokens(model, Identity(site=site)):
                    assert torch.equal(model(**inputs).logits, plain), (shape, site)
    return True
