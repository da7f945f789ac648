"""PaliGemma: a SigLIP tower of fixed size, and a prompt all of whose tokens see one another both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tokenreduce.models.family import Inputs, Modality, ModelFamily
from tokenreduce.models.llava import Llava
from tokenreduce.models.recipe import SIZE, Recipe, text_settings, vision_settings
from tokenreduce.models.towers import tower_flops
from tokenreduce.reducer import Geometry


class PaliGemma(Llava):
    """PaliGemma 1 and 2. Where the text decoder has sliding windows (2), they count the tokens that are left behind a
    step before the language model, and all tokens behind a step inside it."""

    classes = ("PaliGemmaForConditionalGeneration",)
    class_token = False
    configured = ()
    needs: ClassVar[Mapping[str, str]] = {}
    first_position = 1

    def __init__(self, model: PreTrainedModel) -> None:
        ModelFamily.__init__(self, model)  # there is one kind of tower, and nothing to choose about its features

    @property
    def geometry(self) -> Geometry:
        config = self.model.config
        return Geometry(
            encoder_layers=config.vision_config.num_hidden_layers,
            decoder_layers=config.text_config.num_hidden_layers,
            feature_layer=config.vision_config.num_hidden_layers - 1,
            class_token=False,
            tokens=(config.vision_config.image_size // config.vision_config.patch_size) ** 2,
        )

    @property
    def vision_inputs(self) -> tuple[str, ...]:
        return ("pixel_values",)

    def contained(self, features: list[Tensor], modality: Modality) -> Any:
        return torch.cat(list(features))[None]

    def blocks(self, inputs: Inputs) -> Tensor | None:
        kinds = inputs.get("token_type_ids")
        return None if kinds is None else torch.where(kinds == 0, 0, -1)

    def vision_flops(self, patches: int) -> float:
        vision = self.model.config.vision_config
        return tower_flops(patches, vision) + 2 * patches * vision.hidden_size * vision.projection_dim

    @classmethod
    def recipes(cls) -> Mapping[str, Recipe]:
        def recipe(attention: str, **text: Any) -> Recipe:
            return Recipe(
                model="PaliGemmaForConditionalGeneration",
                processor="PaliGemmaProcessor",
                config=lambda ids: transformers.PaliGemmaConfig(
                    vision_config=transformers.SiglipVisionConfig(
                        **vision_settings(), vision_use_head=False, projection_dim=64
                    ),
                    text_config=text_settings(head_dim=16, **text),
                    image_token_index=ids["<image>"],
                    projection_dim=64,
                    hidden_size=64,
                    tie_word_embeddings=False,
                ),
                image_processor=lambda: transformers.SiglipImageProcessorPil(size=SIZE, image_seq_length=16),
                chat=False,
                attention=attention,
            )

        return {
            "paligemma": recipe("sdpa", model_type="gemma"),
            "paligemma2": recipe(
                "eager",
                model_type="gemma2",
                query_pre_attn_scalar=16,
                sliding_window=64,  # wider than its prompts
            ),
        }
