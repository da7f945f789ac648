"""InternVL: an image is cut into tiles of one size, and four patches (2 x 2) of a tile make one visual token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from tokenreduce.flops import encoder_layer_flops
from tokenreduce.models.family import EncodedTile, Inputs, Modality, ModelFamily, Picture, cut_up
from tokenreduce.models.recipe import SIZE, SQUARE_FRAMES, Recipe, text_settings, vision_settings
from tokenreduce.reducer import AtEncoder, AtEncoderOutput, AtInput, Geometry, Grid, Step


class InternVL(ModelFamily):
    """InternVL 2.5, 3 and 3.5 with a vision transformer that has a class token.

    A video's frames are pictures of one tile: nothing in the model's inputs but the words between them tells them from
    images, so that what shall see a whole video has to see all pictures of a prompt.
    """

    classes = ("InternVLForConditionalGeneration",)
    class_token = True
    configured: ClassVar[tuple[str, ...]] = ("vision_feature_layer", "vision_feature_select_strategy")
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its tiles have the vision tower's size",
        AtEncoder: "its projector needs whole tiles",
        AtEncoderOutput: "its projector makes one visual token of several patches",
    }

    @property
    def geometry(self) -> Geometry:
        config = self.model.config
        depth = config.vision_config.num_hidden_layers
        return Geometry(
            encoder_layers=depth,
            decoder_layers=config.text_config.num_hidden_layers,
            feature_layer=config.vision_feature_layer % (depth + 1) - 1,  # hidden state 0 is the first layer's input
            class_token=True,
            tokens=config.image_seq_length,
            patches_per_token=round(1 / config.downsample_ratio**2),
        )

    def pictures(self, inputs: Inputs) -> list[Picture]:
        pixels, patch = inputs["pixel_values"], self.model.config.vision_config.patch_size
        height, width = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
        places = torch.arange(height * width).view(1, height, width, 1)
        shuffled = self.model.base_model.pixel_shuffle(places, scale_factor=self.model.config.downsample_ratio)
        grid, patches = Grid(*shuffled.shape[1:3]), shuffled.flatten(0, 2)
        pictures, first = [], 0
        for run in _runs(inputs["input_ids"], self.model.config.image_token_id):
            last = first + run // len(grid)
            roles = cut_up(grid, *_arrangement(pixels[first:last]))
            tiles = tuple(
                EncodedTile(grid, patches, number, None, height * width, *role)
                for number, role in enumerate(roles, start=first)
            )
            tokens = torch.arange(run)
            pictures.append(Picture("image", tiles, tokens, torch.zeros_like(tokens), pixels[first:last]))
            first = last
        return pictures

    def encoder_layers(self, modality: Modality = "image") -> Sequence[nn.Module]:
        return self.model.base_model.vision_tower.encoder.layer

    def encoder_attention(self, modality: Modality = "image") -> Sequence[nn.Module]:
        layers: Sequence[Any] = self.encoder_layers(modality)
        return [layer.attention for layer in layers]

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        encoded = self.model.base_model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        sizes = _runs(inputs["input_ids"], self.model.config.image_token_id)
        return [(features,) for features in encoded.pooler_output.flatten(0, 1).split(sizes)]

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        return {"pixel_values": torch.cat([picture.pixels for picture in self.pictures(inputs)[pictures]])}

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        return torch.cat(list(features))[None]

    def vision_flops(self, patches: int) -> float:
        vision, projector = self.model.config.vision_config, self.model.base_model.multi_modal_projector
        height, width = vision.patch_size
        embedding = 2 * patches * vision.num_channels * height * width * vision.hidden_size
        tower = vision.num_hidden_layers * encoder_layer_flops(patches + 1, vision)
        tokens = patches * self.model.config.downsample_ratio**2
        linear = (projector.linear_1, projector.linear_2)
        return embedding + tower + sum(2 * tokens * layer.in_features * layer.out_features for layer in linear)

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        return {
            "internvl": Recipe(
                model="InternVLForConditionalGeneration",
                processor="InternVLProcessor",
                config=lambda ids: transformers.InternVLConfig(
                    vision_config=vision_settings(image_size=[32, 32], patch_size=[8, 8], layer_scale_init_value=1.0),
                    text_config=transformers.Qwen2Config(**text_settings()),
                    image_token_id=ids["<IMG_CONTEXT>"],
                    image_seq_length=4,
                    tie_word_embeddings=False,
                ),
                image_processor=lambda: transformers.GotOcr2ImageProcessorPil(
                    size=SIZE, crop_to_patches=True, max_patches=4
                ),
                image="<IMG_CONTEXT>",
                video="<video>",
                tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
                named={
                    "start_image_token": "<img>",
                    "end_image_token": "</img>",
                    "context_image_token": "<IMG_CONTEXT>",
                    "video_token": "<video>",
                },
                settings={"image_seq_length": 4},
                frames=SQUARE_FRAMES,
            )
        }


def _arrangement(tiles: Tensor) -> tuple[int, int]:
    """Rows and columns of the crops among a picture's tiles ``(tiles, channels, height, width)``; 0 for a single tile.

    The inputs do not tell it: it is the arrangement that looks most like the last tile, the picture as a whole.
    """
    count, cells = len(tiles) - 1, functional.adaptive_avg_pool2d(tiles.float(), 4)

    def unlikeness(rows: int) -> tuple[float, int]:
        mosaic = rearrange(cells[:-1], "(rows columns) c h w -> c (rows h) (columns w)", rows=rows)
        whole = functional.adaptive_avg_pool2d(tiles[-1].float(), (mosaic.shape[-2], mosaic.shape[-1]))
        return float((mosaic - whole).square().mean()), abs(rows - count // rows)

    rows = min((rows for rows in range(1, count + 1) if count % rows == 0), key=unlikeness, default=0)
    return rows, count // max(rows, 1)


def _runs(input_ids: Tensor, placeholder: int) -> list[int]:
    """How long each run of placeholders is: an image's tiles follow one another with nothing between."""
    runs: list[int] = []
    for row in (input_ids == placeholder).cpu():
        values, counts = row.unique_consecutive(return_counts=True)
        runs += counts[values].tolist()
    return runs
