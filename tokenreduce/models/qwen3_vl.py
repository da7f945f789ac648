"""Qwen3-VL: as Qwen2-VL, and features of the tower's deeper layers are added behind the first decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tokenreduce.flops import encoder_layer_flops
from tokenreduce.models.family import Inputs, Modality
from tokenreduce.models.qwen2_vl import Qwen2VL, merger_flops, packed_recipe, patch_flops
from tokenreduce.models.recipe import Recipe
from tokenreduce.models.stack import Arguments, DecoderStack


class Qwen3VL(Qwen2VL):
    """Qwen3-VL. The added features of a visual token go where it goes; of merged ones their mean is added.

    When a frame is of stands in the prompt's words alone.
    """

    classes = ("Qwen3VLForConditionalGeneration",)

    @property
    def stack(self) -> DecoderStack:
        return Qwen3Stack(self.decoder)

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        encoded = self.encoded(inputs, modality)
        return list(zip(encoded.pooler_output, *encoded.deepstack_features, strict=True))

    def outputs(self, rows: Sequence[Sequence[Tensor]]) -> BaseModelOutputWithPooling:
        features, *deeper = (list(level) for level in rows)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=deeper)

    def vision_flops(self, patches: int) -> float:
        vision = self.model.config.vision_config
        mergers = 1 + len(vision.deepstack_visual_indexes)
        merged = vision.hidden_size * vision.spatial_merge_size**2
        return (
            patch_flops(patches, vision, vision.hidden_size)
            + vision.depth * encoder_layer_flops(patches, vision)
            + mergers * merger_flops(patches, vision, merged, vision.out_hidden_size)
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
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        }
        return {"qwen3_vl": packed_recipe("Qwen3VL", vision, {"head_dim": 16}, mrope_interleaved=True)}


class Qwen3Stack(DecoderStack):
    """Adds features of the vision tower's deeper layers to the visual tokens behind its first layers."""

    def take_deepstack(self, arguments: Arguments) -> tuple[list[Tensor], Arguments]:
        added = arguments.get("deepstack_visual_embeds")
        if added is None:
            return [], arguments
        visual = arguments["visual_pos_masks"]
        levels = [features.new_zeros(*visual.shape, features.shape[-1]) for features in added]
        for level, features in zip(levels, added, strict=True):
            level[visual.to(level.device)] = features
        return levels, {**arguments, "visual_pos_masks": None, "deepstack_visual_embeds": None}
