"""Every reducer keeps the invariants on the embedded model, whose weights are trained, in both precisions.

It is shown pictures of 4 x 4 patches, for which a corner of its position embeddings is taken: bfloat16 is slow on
CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenreduce import available, create
from tokenreduce.models.loading import EMBEDDED, load
from tokenreduce.reducer import TokenReducer
from tokenreduce.testing import Identity, check_reducer
from tokenreduce.testing.checkpoints import ask, picture
from tokenreduce.testing.clip import write_clip

SIDE, PATCH = 4, 8

Setting = tuple[Any, dict[str, Tensor]]
"""The model; and three prompts, about one picture, about three, and about none, of which each is run alone too."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def setting(request: pytest.FixtureRequest) -> Setting:
    pixels = {"height": SIDE * PATCH, "width": SIDE * PATCH}
    model, processor = load(EMBEDDED, dtype=request.param, image={"size": pixels, "crop_size": pixels})
    vision: Any = model.config.vision_config
    whole = vision.image_size // PATCH
    corner = torch.arange(whole**2).reshape(whole, whole)[:SIDE, :SIDE].flatten()
    embeddings: Any = model.base_model.vision_tower.embeddings
    weight = embeddings.position_embedding.weight[torch.cat([torch.zeros(1, dtype=torch.long), 1 + corner])]
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight)
    embeddings.position_ids = torch.arange(len(weight))[None]
    embeddings.image_size = vision.image_size = SIDE * PATCH
    model.config.image_seq_length = SIDE**2
    return model, ask(processor, [[picture(0, 60, 40)], [picture(number, 50, 50) for number in (1, 2, 3)], []])


@pytest.mark.parametrize("name", [name for name in [*available("reducers"), "identity"] if name != "chain"])
def test_reducer(
    setting: Setting, made: Callable[[str], TokenReducer], tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    model, inputs = setting
    reducer = Identity() if name == "identity" else made(name)
    if "clip" in reducer.knobs():
        clip = write_clip(tmp_path_factory.mktemp("clip"), width=model.config.vision_config.hidden_size)
        reducer = create(name, clip=str(clip))
    check_reducer(reducer, model, inputs)
