"""Random-weight checkpoints of every supported model family, written to a directory and loaded as real ones are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

from tokenreduce.testing.models import draw_weights

VOCABULARY = 192
_WORDS = (
    "what which where how many is are there the a of in on colour shape red green blue square circle left right and"
)
_COMMON = ("<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:")
_TEMPLATE = (
    "{{{{ bos_token }}}}{{% for message in messages %}}USER: {{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image} {{% elif part['type'] == 'video' %}}{video} "
    "{{% else %}}{{{{ part['text'] }}}} {{% endif %}}"
    "{{% endfor %}}{{% endfor %}}{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
)

Ids = Mapping[str, int]
"""The token id of every word."""


@dataclass(frozen=True)
class Recipe:
    """How a family's checkpoint is made. ``image`` and ``video`` are what a prompt says in the place of one.

    ``named`` are tokens that the family's processor reads from its tokenizer by name; ``settings`` the processor's own.
    """

    processor: str
    config: Callable[[Ids], PreTrainedConfig]
    image_processor: Callable[[], Any]
    image: str = "<image>"
    video: str = ""
    tokens: tuple[str, ...] = ("<image>",)
    named: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_checkpoint(family: str, directory: str | Path, *, seed: int = 0, words: Iterable[str] = ()) -> Path:
    """Write a small random-weight checkpoint of ``family``, with its processor, and return its directory.

    Its vocabulary holds ``words`` beside those for its own prompts. It never ends an answer and never answers with a
    placeholder. Raises ``ValueError`` for a family that is not in :data:`RECIPES`.
    """
    if family not in RECIPES:
        raise ValueError(f"there is no tiny checkpoint of {family!r}: known: {', '.join(RECIPES)}")
    recipe, directory = RECIPES[family], Path(directory)
    names = list(dict.fromkeys([*_COMMON, *recipe.tokens, *_WORDS.split(), *words]))
    if len(names) > VOCABULARY:
        raise ValueError(f"{len(names)} words and special tokens do not fit the vocabulary of {VOCABULARY}")
    names += [f"word{number}" for number in range(len(names), VOCABULARY)]
    ids = {name: place for place, name in enumerate(names)}
    _write_model(recipe, ids, directory, seed)
    _tokenizer(recipe, ids).save_pretrained(directory)
    recipe.image_processor().save_pretrained(directory)
    settings = {"processor_class": recipe.processor, **recipe.settings}
    (directory / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return directory


def _write_model(recipe: Recipe, ids: Ids, directory: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(recipe.config(ids))
    draw_weights(model, seed)
    with torch.no_grad():
        for token in recipe.tokens:
            model.lm_head.weight[ids[token]] = 0
    model.generation_config.pad_token_id = ids["<pad>"]
    model.generation_config.eos_token_id = None  # random weights shall not end a comparison early
    model.save_pretrained(directory)


def _tokenizer(recipe: Recipe, ids: Ids) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[token for token in recipe.tokens if token not in recipe.named.values()],
        model_specific_special_tokens=dict(recipe.named),
        chat_template=_TEMPLATE.format(image=recipe.image, video=recipe.video),
        padding_side="left",
    )


def _text(**changes: Any) -> dict[str, Any]:
    """A decoder of 4 layers with grouped queries."""
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,  # with tied weights a random model repeats its last word
        **changes,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    """A vision tower of 4 layers that sees 4 x 4 patches of 8 pixels."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        **changes,
    }


_PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def _llava_next(ids: Ids) -> PreTrainedConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text()),
        image_token_index=ids["<image>"],
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_ids(ids: Ids) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen2_5_vl(ids: Ids) -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "window_size": 32,  # 2 x 2 tokens: a picture of 3 x 4 tokens has windows, and they permute its patches
            "fullatt_block_indexes": [1, 3],
        },
        text_config=_text(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}),
        tie_word_embeddings=False,
        **_qwen_ids(ids),
    )


def _qwen_pictures() -> Any:
    return Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 4 * 256, "longest_edge": 20 * 256})


_GEMMA_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def _gemma3(ids: Ids) -> PreTrainedConfig:
    return Gemma3Config(
        vision_config={**_vision(), "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=_text(
            head_dim=16,
            query_pre_attn_scalar=16,
            num_hidden_layers=6,
            sliding_window=12,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        ),
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        tie_word_embeddings=False,
    )


RECIPES: Mapping[str, Recipe] = {
    "llava_next": Recipe(
        processor="LlavaNextProcessor",
        config=_llava_next,
        image_processor=lambda: LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=_PINPOINTS
        ),
        settings={"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "qwen2_5_vl": Recipe(
        processor="Qwen2_5_VLProcessor",
        config=_qwen2_5_vl,
        image_processor=_qwen_pictures,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        tokens=_QWEN_TOKENS,
    ),
    "gemma3": Recipe(
        processor="Gemma3Processor",
        config=_gemma3,
        image_processor=lambda: Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        image="<start_of_image>",
        tokens=_GEMMA_TOKENS,
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        settings={"image_seq_length": 4},
    ),
}
