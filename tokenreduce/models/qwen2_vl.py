"""Qwen2-VL: pictures of any size in one packed sequence, 2 x 2 patches to a token, positions in space and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tokenreduce.models.family import EncodedTile, Inputs, Modality, ModelFamily, Picture
from tokenreduce.models.recipe import Ids, Recipe, text_settings
from tokenreduce.models.stack import CACHE
from tokenreduce.reducer import AtEncoder, AtEncoderOutput, AtInput, Geometry, Grid, Role, Step

_NAMES: Mapping[Modality, tuple[str, str]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


class Qwen2VL(ModelFamily):
    """Qwen2-VL. A video's frames (pairs of them, as the tower takes them) are tiles of it."""

    classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    needs: ClassVar[Mapping[str, str]] = {
        **dict(_NAMES.values()),
        **{layout: pixels for pixels, layout in _NAMES.values()},
    }
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its image processor cuts pictures into patches: set that to fewer pixels instead",
        AtEncoder: "its merger needs whole blocks of patches",
        AtEncoderOutput: "its merger makes one visual token of several patches",
    }
    counts_padding = False

    @property
    def geometry(self) -> Geometry:
        depth = self.model.config.vision_config.depth
        return Geometry(
            encoder_layers=depth,
            decoder_layers=self.model.config.text_config.num_hidden_layers,
            feature_layer=depth - 1,
            class_token=False,
            patches_per_token=self.model.config.vision_config.spatial_merge_size**2,
        )

    @property
    def placeholders(self) -> Mapping[Modality, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")

    def check_call(self, inputs: Inputs) -> None:
        super().check_call(inputs)
        if inputs.get("mm_token_type_ids") is None and inputs.get("position_ids") is None:
            raise ValueError(
                "mm_token_type_ids is missing, from which the positions of pictures in space and time are computed: "
                "pass all that the processor made, or position_ids"
            )

    def pictures(self, inputs: Inputs) -> list[Picture]:
        return [
            picture
            for modality, (_, layout) in _NAMES.items()
            if inputs.get(layout) is not None
            for picture in self._pictures(inputs, modality)
        ]

    def _pictures(self, inputs: Inputs, modality: Modality) -> list[Picture]:
        pixels, layout = (inputs[name] for name in _NAMES[modality])
        merge = self.model.config.vision_config.spatial_merge_size
        places = self.packed_places(layout.cpu())
        pictures, first = [], 0
        for number, (time, height, width) in enumerate(layout.tolist()):
            role: Role = "frame" if modality == "video" else "whole"
            interval = self.interval(inputs, number) if modality == "video" else None
            tiles = []
            for frame in range(time):
                second = None if interval is None else interval * frame
                extent = slice(first + frame * height * width, first + (frame + 1) * height * width)
                patches = places[extent].view(-1, merge**2) - extent.start
                grid = Grid(height // merge, width // merge)
                tiles.append(EncodedTile(grid, patches, 0, extent, height * width, role, time=second))
            tokens = torch.arange(time * height * width // merge**2)
            last = first + time * height * width
            pictures.append(Picture(modality, tuple(tiles), tokens, torch.zeros_like(tokens), pixels[first:last]))
            first = last
        return pictures

    def interval(self, inputs: Inputs, video: int) -> float | None:
        """How many seconds the model is told to lie between the frames of one of the call's videos; None if it is not
        told."""
        return None

    def packed_places(self, layout: Tensor) -> Tensor:
        """Where every patch of pictures of ``layout`` (pictures, 3) stands in the tower's sequence: ``(patches,)``."""
        return torch.arange(int(layout.prod(-1).sum()))

    def encoder_layers(self, modality: Modality = "image") -> Sequence[nn.Module]:
        return self.model.base_model.visual.blocks

    def encoder_attention(self, modality: Modality = "image") -> Sequence[nn.Module]:
        layers: Sequence[Any] = self.encoder_layers(modality)
        return [layer.attn for layer in layers]

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        return [(features,) for features in self.encoded(inputs, modality).pooler_output]

    def encoded(self, inputs: Inputs, modality: Modality) -> Any:
        """The model's own output for all pictures of a modality."""
        encode = getattr(self.model.base_model, f"get_{modality}_features")
        prepared = {  # what a caller computed for the tower in advance, such as image_cu_seqlens
            name: value
            for name, value in inputs.items()
            if name.startswith(f"{modality}_") and name not in self.vision_inputs
        }
        return encode(*(inputs[name] for name in _NAMES[modality]), return_dict=True, **prepared)

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        pixels, layout = _NAMES[modality]
        chosen = self._pictures(inputs, modality)[pictures]
        return {pixels: torch.cat([picture.pixels for picture in chosen]), layout: inputs[layout][pictures]}

    def positions(self, inputs: Inputs) -> Tensor:
        known = {name: value for name, value in inputs.items() if name not in CACHE}
        return self.model._prepare_position_ids_for_generation(inputs["input_ids"], known)

    def vision_flops(self, patches: int) -> float:
        vision, text = self.model.config.vision_config, self.model.config.text_config
        width, merged = vision.embed_dim, vision.embed_dim * vision.spatial_merge_size**2
        layer = 8 * patches * width**2 + 4 * patches**2 * width + 4 * patches * width**2 * vision.mlp_ratio
        return (
            patch_flops(patches, vision, width)
            + vision.depth * layer
            + merger_flops(patches, vision, merged, text.hidden_size)
        )

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        vision = {
            "depth": 4,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 8,
        }
        return {"qwen2_vl": packed_recipe("Qwen2VL", vision)}


def packed_recipe(name: str, vision: Mapping[str, Any], text: Mapping[str, Any] | None = None, **rope: Any) -> Recipe:
    """The recipe of a checkpoint whose classes' names begin with ``name``."""
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    size = {"shortest_edge": 4 * 256, "longest_edge": 20 * 256}  # 4 to 20 tokens of 16 x 16 pixels
    positions = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3], **rope}

    def make(ids: Ids) -> PreTrainedConfig:
        return getattr(transformers, f"{name}Config")(
            vision_config=dict(vision),
            text_config=text_settings(rope_parameters=dict(positions), **text or {}),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )

    return Recipe(
        model=f"{name}ForConditionalGeneration",
        processor=f"{name}Processor",
        config=make,
        image_processor=lambda: transformers.Qwen2VLImageProcessorPil(patch_size=8, size=dict(size)),
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        tokens=tokens,
        frames={"size": size, "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2},
    )


def patch_flops(patches: int, vision: Any, width: int) -> float:
    """FLOPs of embedding patches that reach over ``temporal_patch_size`` frames."""
    return 2 * patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width


def merger_flops(patches: int, vision: Any, merged: int, width: int) -> float:
    """FLOPs of the two-layer network that makes one token of a square of ``spatial_merge_size`` patches a side."""
    return 2 * patches / vision.spatial_merge_size**2 * merged * (merged + width)
