"""Video-LLaVA: a CLIP tower for images and one for videos, every frame of which keeps its class token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from tokenreduce.models.family import EncodedTile, Inputs, Modality, Picture
from tokenreduce.models.llava import Llava
from tokenreduce.models.recipe import CLASS_TOKEN, CLIP_FRAMES, CLIP_PICTURES, Recipe, text_settings, vision_settings
from tokenreduce.models.towers import clip_layers
from tokenreduce.reducer import AtEncoder, AtInput, Grid, Step


class VideoLlava(Llava):
    """Video-LLaVA. The class token of a frame stays while any other token of the frame does."""

    classes = ("VideoLlavaForConditionalGeneration",)
    needs: ClassVar[Mapping[str, str]] = {}
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its pictures have the vision towers' size",
        AtEncoder: "its frames are passed on whole, with their class token",
    }

    @property
    def placeholders(self) -> Mapping[Modality, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values", "pixel_values_images", "pixel_values_videos")  # of images, the new name and the old

    def pictures(self, inputs: Inputs) -> list[Picture]:
        patch = self.model.config.vision_config.patch_size
        pictures = []
        for number, pixels in enumerate(_pixels(inputs, "image")):
            grid = Grid(pixels.shape[-2] // patch, pixels.shape[-1] // patch)
            pictures.append(Picture.plain(grid, pixels, number))
        for number, pixels in enumerate(_pixels(inputs, "video")):
            grid, count = Grid(pixels.shape[-2] // patch, pixels.shape[-1] // patch), len(pixels)
            places = torch.arange(len(grid))
            frames = range(number * count, (number + 1) * count)
            tiles = tuple(EncodedTile(grid, places, frame, None, len(grid), "frame") for frame in frames)
            tokens = torch.cat([torch.full((count, 1), -1), torch.arange(count * len(grid)).view(count, -1)], dim=1)
            lines = torch.arange(count)[:, None].expand_as(tokens)
            pictures.append(Picture("video", tiles, tokens.flatten(), lines.flatten(), pixels))
        return pictures

    def encoder_layers(self, modality: Modality = "image") -> Sequence[nn.Module]:
        return clip_layers(getattr(self.model.base_model, f"{modality}_tower"))

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        pixels = _pixels(inputs, modality)
        encoded = getattr(self.model.base_model, f"get_{modality}_features")(pixels, return_dict=True).pooler_output
        rows = encoded if modality == "image" else encoded.unflatten(0, pixels.shape[:2]).flatten(1, 2)
        return [(features,) for features in rows]

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        return {_name(inputs, modality): _pixels(inputs, modality)[pictures]}

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        return torch.cat(list(features))[None]

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        return {
            "video_llava": Recipe(
                model="VideoLlavaForConditionalGeneration",
                processor="VideoLlavaProcessor",
                config=lambda ids: transformers.VideoLlavaConfig(
                    vision_config=transformers.CLIPVisionConfig(**vision_settings()),
                    text_config=transformers.LlamaConfig(**text_settings()),
                    image_token_index=ids["<image>"],
                    video_token_index=ids["<video>"],
                    image_seq_length=16,
                    video_seq_length=17 * 4,
                ),
                image_processor=lambda: transformers.VideoLlavaImageProcessor(**CLIP_PICTURES),
                video="<video>",
                tokens=("<image>", "<video>"),
                settings=CLASS_TOKEN,
                frames=CLIP_FRAMES,
            )
        }


def _name(inputs: Inputs, modality: Modality) -> str:
    """What a call names the pixels of a modality's pictures: images have a new name and, in some versions of
    transformers, only an old one."""
    if modality == "video":
        return "pixel_values_videos"
    return "pixel_values" if inputs.get("pixel_values") is not None else "pixel_values_images"


def _pixels(inputs: Inputs, modality: Modality) -> Tensor:
    """The pixels of a modality's pictures; none where the call has none of them."""
    given = inputs.get(_name(inputs, modality))
    return torch.empty(0) if given is None else given
