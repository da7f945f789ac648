"""The vision tower of the end-to-end vectors, in a LLaVA that goes through the attaching code as any other does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tokenreduce import reduce_tokens
from tokenreduce.attach import ImageReduction
from tokenreduce.reducer import TokenReducer

from .golden import FOLDER


@cache
def clip_llava(attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """The stored tower of 24 layers, 36 patches and a class token, before a small random language model."""
    vision: dict[str, Any] = json.loads((FOLDER / "e2e_clip_E.config.json").read_text())
    del vision["model_type"], vision["architectures"]
    text = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=16, pad_token_id=0
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=text,
        image_token_id=3,
        image_seq_length=36,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    weights = load_file(FOLDER / "e2e_clip_E.safetensors")
    tower = model.model.vision_tower
    known = set(tower.state_dict())
    strip = {name: name if name in known else name.removeprefix("vision_model.") for name in weights}
    missing, unexpected = tower.load_state_dict({strip[name]: value for name, value in weights.items()}, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return model.eval()


@dataclass
class Encoded:
    """What a reducer let through to the projector: features ``(tokens, dim)`` and the record of every image."""

    features: list[Tensor]
    images: list[ImageReduction]


def encode(reducer: TokenReducer, pixels: Tensor, attention: str = "sdpa") -> Encoded:
    """Run the pictures ``(images, 3, height, width)`` through ``reduce_tokens``, all in one call."""
    model = clip_llava(attention)
    ids = torch.tensor([[1, *[3] * 36, 5]]).expand(len(pixels), -1)
    features: list[Tensor] = []
    with reduce_tokens(model, reducer) as attachment, torch.no_grad():
        hook = model.model.multi_modal_projector.register_forward_pre_hook(
            lambda _, args: features.extend(args[0].detach())
        )
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        finally:
            hook.remove()
    images = [sample.images[0] for sample in attachment.samples]
    return Encoded([row[: len(image.kept)] for row, image in zip(features, images, strict=True)], images)


def assert_equal_states(found: Tensor, expected: Tensor) -> None:
    """Equality to the tolerance of the stored hidden states, whose values reach 15."""
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def opened(pixels: Tensor) -> tuple[Tensor, list[Any]]:
    """What the tower's first layer takes of one picture, ``(37, dim)``, and the layers up to the features."""
    tower = clip_llava().model.vision_tower
    layers = next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
    embeddings, norm = (
        next(module for name, module in tower.named_modules() if name.endswith(part))
        for part in ("embeddings", "pre_layrnorm")
    )
    return norm(embeddings(pixels[None]))[0], list(layers[:23])


def projected(layer: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """One layer's queries, keys and values, ``(heads, tokens, dim)`` each."""
    normed, attention = layer.layer_norm1(hidden), layer.self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    return tuple(part(normed).unflatten(-1, (4, 8)).transpose(0, 1) for part in parts)
