"""LLaVA-1.5: a CLIP or SigLIP tower of fixed size, a projector, and one run of placeholders an image."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from tokenreduce.flops import encoder_layer_flops
from tokenreduce.models.family import Inputs, ModelFamily
from tokenreduce.reducer import AtDecoder, AtEncoder, AtEncoderOutput, AtInput, AtProjector, Geometry, Grid


class Llava(ModelFamily):
    """LLaVA-1.5 with a CLIP (class token dropped) or SigLIP vision tower."""

    classes = ("LlavaForConditionalGeneration",)
    sites = (AtInput, AtEncoder, AtEncoderOutput, AtProjector, AtDecoder)

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
        )

    @property
    def placeholder(self) -> int:
        return self.model.config.image_token_id

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values",)

    def grids(self, inputs: Inputs) -> list[Grid]:
        images, _, height, width = inputs["pixel_values"].shape
        patch = self.model.config.vision_config.patch_size
        return [Grid(height // patch, width // patch)] * images

    @property
    def decoder(self) -> nn.Module:
        return self.model.base_model.language_model

    @property
    def projector(self) -> nn.Module:
        return self.model.base_model.multi_modal_projector

    def encoder_layers(self) -> Sequence[Any]:
        modules = self.model.base_model.vision_tower.named_modules()
        return next(module for name, module in modules if name.endswith("encoder.layers"))

    def encoder_attention(self) -> Sequence[nn.Module]:
        return [layer.self_attn for layer in self.encoder_layers()]

    def encode(self, inputs: Inputs) -> Sequence[Tensor]:
        pixels = inputs["pixel_values"]
        size = self.model.config.vision_config.image_size
        options = {} if pixels.shape[-2:] == (size, size) else {"interpolate_pos_encoding": True}
        return self.model.base_model.get_image_features(pixel_values=pixels, return_dict=True, **options).pooler_output

    def some(self, inputs: Inputs, images: slice) -> Inputs:
        return {"pixel_values": inputs["pixel_values"][images]}

    def fingerprint(self, inputs: Inputs, index: int) -> int:
        pixels = inputs["pixel_values"][index].detach().cpu().contiguous()
        return zlib.crc32(pixels.view(torch.uint8).numpy())

    def resize(self, inputs: Inputs, grids: Sequence[Grid]) -> Inputs:
        patch = self.model.config.vision_config.patch_size
        pixels = inputs["pixel_values"]
        smaller = functional.interpolate(  # every image has the tower's size, so all grids are equal
            pixels.float(), size=(grids[0].height * patch, grids[0].width * patch), mode="bicubic", antialias=True
        )
        return {"pixel_values": smaller.to(pixels.dtype)}

    def vision_flops(self, tokens: int) -> float:
        config = self.model.config
        vision, width = config.vision_config, config.text_config.hidden_size
        sequence = tokens + int(self.geometry.class_token)
        embedding = 2 * tokens * vision.num_channels * vision.patch_size**2 * vision.hidden_size
        layers = vision.num_hidden_layers * encoder_layer_flops(sequence, vision)
        features = self.model.model.multi_modal_projector.linear_1.in_features
        return embedding + layers + 2 * tokens * width * (features + width)
