"""LLaVA-1.5: a CLIP or SigLIP tower of fixed size, a projector, and one run of placeholders an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from tokenreduce.models.family import Inputs, Modality, ModelFamily, Picture
from tokenreduce.models.recipe import CLASS_TOKEN, CLIP_PICTURES, SIZE, Ids, Recipe, text_settings, vision_settings
from tokenreduce.models.towers import clip_layers, tower_flops
from tokenreduce.reducer import Geometry, Grid


class Llava(ModelFamily):
    """LLaVA-1.5 with a CLIP (class token dropped) or SigLIP vision tower."""

    classes = ("LlavaForConditionalGeneration",)
    class_token = True
    configured: ClassVar[tuple[str, ...]] = ("vision_feature_layer", "vision_feature_select_strategy")
    needs: ClassVar[Mapping[str, str]] = {"image_sizes": "pixel_values"}

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config = model.config
        vision = config.vision_config.model_type
        if vision not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(f"a LLaVA model with a {vision!r} tower is not supported: only CLIP and SigLIP towers are")
        if self.geometry.class_token != (config.vision_feature_select_strategy == "default"):
            raise ValueError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a {vision!r} tower is "
                "not supported: its visual tokens would not form the patch grid"
            )

    @property
    def geometry(self) -> Geometry:
        config = self.model.config
        depth, features = config.vision_config.num_hidden_layers, config.vision_feature_layer
        last = max(features, key=lambda layer: layer % (depth + 1)) if isinstance(features, list) else features
        return Geometry(
            encoder_layers=depth,
            decoder_layers=config.text_config.num_hidden_layers,
            feature_layer=last % (depth + 1) - 1,  # hidden state 0 is the first layer's input
            class_token=config.vision_config.model_type == "clip_vision_model",
            tokens=(config.vision_config.image_size // config.vision_config.patch_size) ** 2,
        )

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values", "image_sizes")

    def pictures(self, inputs: Inputs) -> list[Picture]:
        patch = self.model.config.vision_config.patch_size
        return [
            Picture.plain(Grid(pixels.shape[-2] // patch, pixels.shape[-1] // patch), pixels, number)
            for number, pixels in enumerate(inputs["pixel_values"])
        ]

    def encoder_layers(self, modality: Modality = "image") -> Sequence[nn.Module]:
        return clip_layers(self.model.base_model.vision_tower)

    def halves(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.layer_norm2, layer.mlp

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        given = {name: inputs[name] for name in self.vision_inputs if inputs.get(name) is not None}
        size = self.model.config.vision_config.image_size
        options = {} if given["pixel_values"].shape[-2:] == (size, size) else {"interpolate_pos_encoding": True}
        encoded = self.model.base_model.get_image_features(**given, return_dict=True, **options)
        return [(features,) for features in encoded.pooler_output]

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        return {name: inputs[name][pictures] for name in self.vision_inputs if inputs.get(name) is not None}

    def resize(self, inputs: Inputs, grids: Sequence[Grid]) -> Inputs:
        patch = self.model.config.vision_config.patch_size
        pixels = inputs["pixel_values"]
        smaller = functional.interpolate(  # every image has the tower's size, so all grids are equal
            pixels.float(), size=(grids[0].height * patch, grids[0].width * patch), mode="bicubic", antialias=True
        )
        return {"pixel_values": smaller.to(pixels.dtype)}

    def vision_flops(self, patches: int) -> float:
        config = self.model.config
        features = self.model.base_model.multi_modal_projector.linear_1.in_features
        width = config.text_config.hidden_size
        tower = tower_flops(patches, config.vision_config, int(self.geometry.class_token))
        return tower + 2 * patches * width * (features + width)

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        def config(tower: type[PreTrainedConfig], strategy: str, ids: Ids) -> PreTrainedConfig:
            return transformers.LlavaConfig(
                vision_config=tower(**vision_settings()),
                text_config=transformers.LlamaConfig(**text_settings()),
                image_token_index=ids["<image>"],
                image_seq_length=16,
                vision_feature_select_strategy=strategy,
            )

        return {
            "llava": Recipe(
                model="LlavaForConditionalGeneration",
                processor="LlavaProcessor",
                config=lambda ids: config(transformers.CLIPVisionConfig, "default", ids),
                image_processor=lambda: transformers.CLIPImageProcessorPil(**CLIP_PICTURES),
                settings=CLASS_TOKEN,
            ),
            "llava_siglip": Recipe(
                model="LlavaForConditionalGeneration",
                processor="LlavaProcessor",
                config=lambda ids: config(transformers.SiglipVisionConfig, "full", ids),
                image_processor=lambda: transformers.SiglipImageProcessorPil(size=SIZE),
                settings={"patch_size": 8, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
            ),
        }
