"""Qwen2.5-VL: as Qwen2-VL, with attention in windows, for which its tower puts the patches in another order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from tokenreduce.models.family import Inputs, Modality
from tokenreduce.models.qwen2_vl import Qwen2VL, merger_flops, packed_recipe, patch_flops
from tokenreduce.models.recipe import Recipe


class Qwen2_5VL(Qwen2VL):
    """Qwen2.5-VL. For a layer whose attention stays in windows stands the nearest one that sees whole frames."""

    classes = ("Qwen2_5_VLForConditionalGeneration",)

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return (*super().vision_inputs, "second_per_grid_ts")

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        chosen = super().some(inputs, pictures, modality)
        seconds = inputs.get("second_per_grid_ts") if modality == "video" else None
        return chosen if seconds is None else {**chosen, "second_per_grid_ts": seconds[pictures]}

    def interval(self, inputs: Inputs, video: int) -> float | None:
        seconds = inputs.get("second_per_grid_ts")
        return None if seconds is None else float(seconds[video])

    def packed_places(self, layout: Tensor) -> Tensor:
        vision = self.model.config.vision_config
        window_index, _ = get_vision_window_index(
            layout,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
            kwargs={},
        )
        group = vision.spatial_merge_size**2
        return (window_index.argsort()[:, None] * group + torch.arange(group)).flatten()

    def attention_layer(self, layer: int) -> int:
        whole = self.model.config.vision_config.fullatt_block_indexes
        return min(whole, key=lambda other: (abs(other - layer), -other))

    def vision_flops(self, patches: int) -> float:
        vision, width = self.model.config.vision_config, self.model.config.vision_config.hidden_size
        window = min(patches, (vision.window_size // vision.patch_size) ** 2)
        whole = len(vision.fullatt_block_indexes)
        attention = 4 * patches * width * (whole * patches + (vision.depth - whole) * window)
        layer = 8 * patches * width**2 + 6 * patches * width * vision.intermediate_size
        merged: Any = width * vision.spatial_merge_size**2
        return (
            patch_flops(patches, vision, width)
            + vision.depth * layer
            + attention
            + merger_flops(patches, vision, merged, vision.out_hidden_size)
        )

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        vision = {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "window_size": 32,  # 2 x 2 tokens: any larger picture has several windows, and its patches are permuted
            "fullatt_block_indexes": [1, 3],
        }
        return {"qwen2_5_vl": packed_recipe("Qwen2_5_VL", vision)}
