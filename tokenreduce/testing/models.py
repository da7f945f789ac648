"""Small random-weight models of the supported families, and prompts for them; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

PAD, PLACEHOLDER, VOCABULARY = 0, 3, 128


def tiny_llava(
    *,
    tower: Literal["clip", "siglip"] = "clip",
    key_heads: int = 4,
    grid: int = 6,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A LLaVA of ``grid`` x ``grid`` visual tokens, 4 encoder and 4 decoder layers. ``key_heads`` below 4 groups the
    queries.

    Weights have a variance of 1.44 / fan-in, so that attention is far from uniform and greedy tokens are no ties.
    """
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 8 * grid,
        "patch_size": 8,
    }
    clip = tower == "clip"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision) if clip else SiglipVisionConfig(**vision),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=key_heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=PLACEHOLDER,
        image_seq_length=grid * grid,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if clip else "full",
    )
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    draw_weights(model, seed)
    with torch.no_grad():
        model.lm_head.weight[PLACEHOLDER] = 0  # a model that answers with placeholders cannot hold a conversation
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random weights shall not end a comparison early
    return model.to(dtype).eval()


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Give every matrix of ``model`` random weights whose variance is 1.44 / fan-in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.44 / fan_in) ** 0.5)


def prompts(model: PreTrainedModel, images: Sequence[int] = (1,), seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch: one prompt for every entry of ``images``, with that many pictures and texts of different
    lengths."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.vision_config.image_size
    tokens = (size // model.config.vision_config.patch_size) ** 2
    rows = []
    for number, count in enumerate(images):
        parts = [_words(3 + number, generator)]
        for _ in range(count):
            parts += [torch.full((tokens,), PLACEHOLDER), _words(2 + number, generator)]
        rows.append(torch.cat([torch.tensor([1]), *parts]))
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for row, content in enumerate(rows):
        ids[row, width - len(content) :] = content
        mask[row, width - len(content) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if total := sum(images):
        pixels = torch.randn(total, 3, size, size, generator=generator)
        inputs["pixel_values"] = pixels.to(model.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


def _words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(PLACEHOLDER + 1, VOCABULARY, (count,), generator=generator)
