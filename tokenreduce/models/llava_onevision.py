"""LLaVA-OneVision: tiles as in LLaVA-NeXT, shrunk together where there are many; the frames of a video are pooled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape

from tokenreduce.models.family import EncodedTile, Inputs, Modality, Picture
from tokenreduce.models.llava_next import LlavaNext
from tokenreduce.models.recipe import PINPOINTS, SIZE, SQUARE_FRAMES, Recipe, text_settings, vision_settings
from tokenreduce.reducer import AtEncoder, AtEncoderOutput, AtInput, Grid, Step


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision. For a token of a picture that is shrunk stands the patch nearest to its centre, for one of a
    video the four patches about its centre.

    Images that share a prompt are not cut up, as the processor tells the model.
    """

    classes = ("LlavaOnevisionForConditionalGeneration",)
    class_token = False
    configured = (*LlavaNext.configured, "vision_aspect_ratio")
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its tiles have the vision tower's size",
        AtEncoder: "its tiles are put together whole",
        AtEncoderOutput: "behind its projector it makes one visual token of several patches",
    }

    @property
    def placeholders(self) -> Mapping[Modality, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos", "image_sizes_videos")

    def pictures(self, inputs: Inputs) -> list[Picture]:
        images = super().pictures(inputs) if inputs.get("pixel_values") is not None else []
        return [*images, *self._videos(inputs)]

    def _videos(self, inputs: Inputs) -> list[Picture]:
        if inputs.get("pixel_values_videos") is None:
            return []
        patches = self._pooled()
        grid = Grid((self.side + 1) // 2, (self.side + 1) // 2)
        pictures = []
        for number, pixels in enumerate(inputs["pixel_values_videos"]):
            frames = range(number * len(pixels), (number + 1) * len(pixels))
            tiles = tuple(EncodedTile(grid, patches, frame, None, self.side**2, "frame") for frame in frames)
            tokens = torch.tensor([*range(len(tiles) * len(grid)), -1])  # one newline, behind the last frame
            pictures.append(Picture("video", tiles, tokens, torch.zeros_like(tokens), pixels))
        return pictures

    def _pooled(self) -> Tensor:
        """The four patches between whose centres the centre of every token of a frame lies: ``(tokens, 4)``."""
        places = _places(self.side, self.side).view(1, -1, 2)
        low = self.model.base_model.apply_pooling(places)[0].floor().long()  # pooling is linear, and so are places
        rows, columns = low[:, :1], low[:, 1:]
        return (rows + torch.tensor([0, 0, 1, 1])) * self.side + columns + torch.tensor([0, 1, 0, 1])

    def tile_counts(self, inputs: Inputs) -> list[int]:
        counts = super().tile_counts(inputs)
        if inputs.get("batch_num_images") is None:
            return counts
        alone = [number == 1 for number in inputs["batch_num_images"].tolist() for _ in range(number)]
        return [count if cut else 1 for count, cut in zip(counts, alone, strict=True)]

    def packed(self, count: int, size: Tensor) -> Tensor:
        if count == 1:
            return torch.tensor([*range(self.side**2), -1])
        config, side = self.model.config, self.side
        height, width = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        places = _places(height * side, width * side).view(height, side, width, side, 2)
        tiles = torch.cat([_places(side, side).view(1, -1, 2), places.transpose(1, 2).reshape(-1, side**2, 2)])
        (centres,), _ = self.model.base_model.pack_image_features(
            [tiles], size[None], tiles.new_tensor([-1.0, -1.0]), vision_aspect_ratio=config.vision_aspect_ratio
        )
        # Shrinking is linear, and so are places. Of two that are as near the first stands for a token, in every line.
        rows, columns = (centres[side**2 :] - 1e-6).round().long().unbind(-1)
        tile = 1 + rows // side * width + columns // side
        patches = tile * side**2 + rows % side * side + columns % side
        return torch.cat([torch.arange(side**2), patches.masked_fill(rows < 0, -1)])

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        if modality == "video":
            encoded = self.model.base_model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
        else:
            given = {name: inputs.get(name) for name in ("pixel_values", "image_sizes", "batch_num_images")}
            encoded = self.model.base_model.get_image_features(**given, return_dict=True)
        return [(features,) for features in encoded.pooler_output]

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        if modality == "video":
            return {"pixel_values_videos": inputs["pixel_values_videos"][pictures]}
        some = {name: inputs[name][pictures] for name in ("pixel_values", "image_sizes")}
        if inputs.get("batch_num_images") is None:
            return some
        numbers = inputs["batch_num_images"]
        owners = torch.arange(len(numbers), device=numbers.device).repeat_interleave(numbers)[pictures]
        return {**some, "batch_num_images": owners.unique_consecutive(return_counts=True)[1]}

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        return torch.cat(list(features))[None] if modality == "video" else features

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        shrunk = "anyres_max_2"  # four tiles are interpolated down to two tiles' worth of tokens
        return {
            "llava_onevision": Recipe(
                model="LlavaOnevisionForConditionalGeneration",
                processor="LlavaOnevisionProcessor",
                config=lambda ids: transformers.LlavaOnevisionConfig(
                    vision_config=transformers.SiglipVisionConfig(**vision_settings(), vision_use_head=False),
                    text_config=transformers.Qwen2Config(**text_settings()),
                    image_token_index=ids["<image>"],
                    video_token_index=ids["<video>"],
                    image_grid_pinpoints=PINPOINTS,
                    vision_aspect_ratio=shrunk,
                ),
                image_processor=lambda: transformers.LlavaOnevisionImageProcessorPil(
                    size=SIZE, image_grid_pinpoints=PINPOINTS
                ),
                video="<video>",
                tokens=("<image>", "<video>"),
                settings={
                    "num_image_tokens": 16,
                    "vision_feature_select_strategy": "full",
                    "vision_aspect_ratio": shrunk,
                },
                frames=SQUARE_FRAMES,
            )
        }


def _places(height: int, width: int) -> Tensor:
    """Row and column of every place of a map: ``(height, width, 2)``."""
    axes = (torch.arange(size, dtype=torch.float64) for size in (height, width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
