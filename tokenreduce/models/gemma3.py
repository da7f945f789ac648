"""Gemma 3: a SigLIP tower of fixed size whose patches are pooled, and image tokens that see one another both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from tokenreduce.models.family import EncodedTile, Inputs, Modality, ModelFamily, Picture
from tokenreduce.models.recipe import Recipe, text_settings, vision_settings
from tokenreduce.models.towers import clip_layers, pooled_patches, tower_flops
from tokenreduce.reducer import AtEncoder, AtEncoderOutput, AtInput, Geometry, Grid, Step


class Gemma3(ModelFamily):
    """Gemma 3. Crops of a picture, where its processor makes them, are images of their own.

    Behind a step before the language model its sliding windows count the tokens that are left; behind a step inside it
    they count all.
    """

    classes = ("Gemma3ForConditionalGeneration",)
    unhosted: ClassVar[Mapping[type[Step], str]] = {
        AtInput: "its pictures have the vision tower's size",
        AtEncoder: "its projector pools whole grids of patches",
        AtEncoderOutput: "its projector pools several patches into a visual token",
    }

    @property
    def geometry(self) -> Geometry:
        config = self.model.config
        return Geometry(
            encoder_layers=config.vision_config.num_hidden_layers,
            decoder_layers=config.text_config.num_hidden_layers,
            feature_layer=config.vision_config.num_hidden_layers - 1,
            class_token=False,
            tokens=config.mm_tokens_per_image,
            patches_per_token=(config.vision_config.image_size // config.vision_config.patch_size) ** 2
            // config.mm_tokens_per_image,
        )

    def pictures(self, inputs: Inputs) -> list[Picture]:
        config = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        tokens = int(config.mm_tokens_per_image**0.5)
        patches, places = pooled_patches(side, side, side // tokens), torch.arange(tokens**2)
        return [
            Picture(
                "image",
                (EncodedTile(Grid(tokens, tokens), patches, number, None, side**2),),
                places,
                torch.zeros_like(places),
                pixels,
            )
            for number, pixels in enumerate(inputs["pixel_values"])
        ]

    def encoder_layers(self, modality: Modality = "image") -> Sequence[nn.Module]:
        return clip_layers(self.model.base_model.vision_tower)

    def encode(self, inputs: Inputs, modality: Modality = "image") -> list[tuple[Tensor, ...]]:
        encoded = self.model.base_model.get_image_features(inputs["pixel_values"], return_dict=True)
        return [(features,) for features in encoded.pooler_output]

    def some(self, inputs: Inputs, pictures: slice, modality: Modality = "image") -> Inputs:
        return {"pixel_values": inputs["pixel_values"][pictures]}

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        return torch.cat(list(features))[None]

    def blocks(self, inputs: Inputs) -> Tensor | None:
        if inputs.get("token_type_ids") is None:
            return None
        visual = inputs["token_type_ids"] == 1
        starts = visual & ~visual.roll(1, dims=-1)
        starts[:, 0] = visual[:, 0]
        return torch.where(visual, starts.long().cumsum(-1) - 1, -1)

    def vision_flops(self, patches: int) -> float:
        config = self.model.config
        projection = 2 * config.mm_tokens_per_image * config.vision_config.hidden_size * config.text_config.hidden_size
        return tower_flops(patches, config.vision_config) + projection

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        named = {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        }
        text = text_settings(
            head_dim=16,
            query_pre_attn_scalar=16,
            num_hidden_layers=6,
            sliding_window=20,  # more than a picture's tokens, less than a prompt
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        )
        return {
            "gemma3": Recipe(
                model="Gemma3ForConditionalGeneration",
                processor="Gemma3Processor",
                config=lambda ids: transformers.Gemma3Config(
                    vision_config=transformers.SiglipVisionConfig(
                        **vision_settings(image_size=64), vision_use_head=False
                    ),
                    text_config=text,
                    mm_tokens_per_image=16,
                    boi_token_index=ids["<start_of_image>"],
                    eoi_token_index=ids["<end_of_image>"],
                    image_token_index=ids["<image_soft_token>"],
                    tie_word_embeddings=False,
                ),
                image_processor=lambda: transformers.Gemma3ImageProcessorPil(size={"height": 64, "width": 64}),
                image="<start_of_image>",
                tokens=tuple(named.values()),
                named=named,
                settings={"image_seq_length": 16},
            )
        }
