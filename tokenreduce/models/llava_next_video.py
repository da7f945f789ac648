"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; of a video every frame is one tile, pooled before the projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from tokenreduce.models.family import EncodedTile, Inputs, Modality, Picture
from tokenreduce.models.llava_next import LlavaNext
from tokenreduce.models.recipe import (
    CLASS_TOKEN,
    CLIP_FRAMES,
    CLIP_PICTURES,
    PINPOINTS,
    Recipe,
    text_settings,
    vision_settings,
)
from tokenreduce.models.towers import pooled_patches
from tokenreduce.reducer import AtEncoder, AtEncoderOutput, AtInput, Grid, Step


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video."""

    classes = ("LlavaNextVideoForConditionalGeneration",)
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its tiles have the vision tower's size",
        AtEncoder: "its tiles are put together whole",
        AtEncoderOutput: "it makes one visual token of several patches of a frame before its projector",
    }

    @property
    def placeholders(self) -> Mapping[Modality, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values", "image_sizes", "pixel_values_videos")

    def pictures(self, inputs: Inputs) -> list[Picture]:
        images = super().pictures(inputs) if inputs.get("pixel_values") is not None else []
        return [*images, *self._videos(inputs)]

    def _videos(self, inputs: Inputs) -> list[Picture]:
        if inputs.get("pixel_values_videos") is None:
            return []
        stride = self.model.config.spatial_pool_stride
        patches, grid = pooled_patches(self.side, self.side, stride), Grid(self.side // stride, self.side // stride)
        pictures = []
        for number, pixels in enumerate(inputs["pixel_values_videos"]):
            frames = range(number * len(pixels), (number + 1) * len(pixels))
            tiles = tuple(EncodedTile(grid, patches, frame, None, self.side**2, "frame") for frame in frames)
            tokens = torch.arange(len(tiles) * len(grid))
            pictures.append(Picture("video", tiles, tokens, torch.zeros_like(tokens), pixels))
        return pictures

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        if modality == "image":
            return super().encode(inputs)
        encoded = self.model.base_model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
        return [(features.flatten(0, -2),) for features in encoded.pooler_output]  # some versions give frame by frame

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        names = ("pixel_values", "image_sizes") if modality == "image" else ("pixel_values_videos",)
        return {name: inputs[name][pictures] for name in names}

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        return [torch.cat(list(features))[None]] if modality == "video" else features  # a video's entry is 3-D

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        return {
            "llava_next_video": Recipe(
                model="LlavaNextVideoForConditionalGeneration",
                processor="LlavaNextVideoProcessor",
                config=lambda ids: transformers.LlavaNextVideoConfig(
                    vision_config=transformers.CLIPVisionConfig(**vision_settings()),
                    text_config=transformers.LlamaConfig(**text_settings()),
                    image_token_index=ids["<image>"],
                    video_token_index=ids["<video>"],
                    image_grid_pinpoints=PINPOINTS,
                    image_seq_length=16,
                    video_seq_length=4,
                ),
                image_processor=lambda: transformers.LlavaNextImageProcessorPil(
                    **CLIP_PICTURES, image_grid_pinpoints=PINPOINTS
                ),
                video="<video>",
                tokens=("<image>", "<video>"),
                settings=CLASS_TOKEN,
                frames=CLIP_FRAMES,
            )
        }
