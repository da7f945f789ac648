"""LLaVA-NeXT: an overview tile and a grid of tiles without its padding, every row of which ends with a newline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import transformers
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokenreduce.models.family import EncodedTile, Inputs, Modality, Picture
from tokenreduce.models.llava import Llava
from tokenreduce.models.recipe import CLASS_TOKEN, CLIP_PICTURES, PINPOINTS, Recipe, text_settings, vision_settings
from tokenreduce.reducer import AtEncoder, AtInput, Grid, Role, Step


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6). Every tile is reduced by itself, without what lies in the padding."""

    classes = ("LlavaNextForConditionalGeneration",)
    needs: ClassVar[Mapping[str, str]] = {"image_sizes": "pixel_values", "pixel_values": "image_sizes"}
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its tiles have the vision tower's size",
        AtEncoder: "its tiles are put together whole",
    }

    def pictures(self, inputs: Inputs) -> list[Picture]:
        pictures, first = [], 0
        described = zip(inputs["pixel_values"], inputs["image_sizes"], self.tile_counts(inputs), strict=True)
        for pixels, size, count in described:
            pictures.append(tiled(self.packed(count, size), self.side, count, first, pixels[:count]))
            first += count
        return pictures

    @property
    def side(self) -> int:
        """How many patches a tile has along either side."""
        return self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size

    def tile_counts(self, inputs: Inputs) -> list[int]:
        """How many tiles every image of a call is cut into."""
        config = self.model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in inputs["image_sizes"]
        ]

    def packed(self, count: int, size: Tensor) -> Tensor:
        """The patch, counted through the ``count`` tiles of a picture of ``size`` (height, width), that stands at each
        of its placeholders in the model's own packing; -1 at newlines: ``(placeholders,)``."""
        places = torch.arange(count * self.side**2, dtype=torch.float64).view(count, self.side**2, 1)
        packed, _ = self.model.base_model.pack_image_features(
            [places], size[None], vision_feature_select_strategy="default", image_newline=places.new_tensor([-1.0])
        )
        return packed[0].flatten().long()

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        encoded = self.model.base_model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"], return_dict=True
        )
        return [(features,) for features in encoded.pooler_output]

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        return {
            "llava_next": Recipe(
                model="LlavaNextForConditionalGeneration",
                processor="LlavaNextProcessor",
                config=lambda ids: transformers.LlavaNextConfig(
                    vision_config=transformers.CLIPVisionConfig(**vision_settings()),
                    text_config=transformers.LlamaConfig(**text_settings()),
                    image_token_index=ids["<image>"],
                    image_grid_pinpoints=PINPOINTS,
                    image_seq_length=16,
                ),
                image_processor=lambda: transformers.LlavaNextImageProcessorPil(
                    **CLIP_PICTURES, image_grid_pinpoints=PINPOINTS
                ),
                settings=CLASS_TOKEN,
            )
        }


def tiled(packed: Tensor, side: int, count: int, first: int, pixels: Tensor) -> Picture:
    """A picture of ``count`` tiles of ``side`` x ``side`` patches, the first of which is encoder sequence ``first``.

    packed: ``(placeholders,)`` long, the patch, counted through the tiles, that stands at every placeholder; -1 for a
            newline. A tile's patches in it form a rectangle, for what lies in the picture's padding is left out.
    """
    newline = packed < 0
    overview = side**2 if count > 1 else 0
    lines = newline.long().cumsum(0) - newline.long() + 1
    lines[:overview] = 0
    lines[~torch.isin(lines, lines[~newline])] = 0  # newlines of lines that lie in the padding whole: the picture's
    tiles: list[EncodedTile] = []
    tokens, before = packed.clone(), 0
    for number in range(count):
        own = packed[(packed >= 0) & (packed // side**2 == number)].sort().values
        if not len(own):
            continue
        patches = own % side**2
        width = len((patches % side).unique())
        tokens[torch.isin(packed, own)] = before + torch.searchsorted(own, packed[torch.isin(packed, own)])
        grid = Grid(len(own) // width, width)
        role: Role = "whole" if count == 1 else "thumbnail"
        row = column = 0
        if number > 0:
            place = int((packed == own[0]).nonzero()[0])
            role, row = "crop", int(lines[place]) - 1
            column = place - int((lines == lines[place]).nonzero()[0])
        tiles.append(EncodedTile(grid, patches, first + number, None, side**2, role, row, column))
        before += len(own)
    return Picture("image", tuple(tiles), tokens, lines, pixels)
