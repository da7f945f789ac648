"""Random-weight checkpoints of every supported model family, written to a directory and loaded as real ones are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    VideoLlavaConfig,
    VideoLlavaImageProcessor,
)

from tokenreduce.testing.models import draw_weights

VOCABULARY = 192
_WORDS = "what which where how many is are there the a of in on colour shape red green blue square circle left right"
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CONTENT = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE "
    "{% elif part['type'] == 'video' %}VIDEO {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
)
_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: "
    + _CONTENT
    + "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

Ids = Mapping[str, int]
"""The token id of every word."""


@dataclass(frozen=True)
class Recipe:
    """How a family's checkpoint is made. ``image`` and ``video`` are what a prompt says in the place of one.

    ``named`` are tokens that the family's processor reads from its tokenizer by name; ``settings`` are the processor's
    own, ``frames`` those of its video processor. ``attention`` is a kernel that the model can do with.
    """

    processor: str
    config: Callable[[Ids], PreTrainedConfig]
    image_processor: Callable[[], Any]
    image: str = "<image>"
    video: str = ""
    tokens: tuple[str, ...] = ("<image>",)
    named: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    frames: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = _CHAT
    attention: str = "sdpa"

    @property
    def model(self) -> str:
        """The transformers class of the model."""
        return self.processor.replace("Processor", "ForConditionalGeneration")


def write_checkpoint(family: str, directory: str | Path, *, seed: int = 0, words: Iterable[str] = ()) -> Path:
    """Write a small random-weight checkpoint of ``family``, with its processor, and return its directory.

    Its vocabulary holds ``words`` beside those for its own prompts. It never ends an answer and never answers with a
    special token. Raises ``ValueError`` for a family that is not in :data:`RECIPES`.
    """
    if family not in RECIPES:
        raise ValueError(f"there is no tiny checkpoint of {family!r}: known: {', '.join(RECIPES)}")
    recipe, directory = RECIPES[family], Path(directory)
    names = list(dict.fromkeys([*_SPECIAL, *recipe.tokens, "USER:", "ASSISTANT:", *_WORDS.split(), *words]))
    if len(names) > VOCABULARY:
        raise ValueError(f"{len(names)} words and special tokens do not fit the vocabulary of {VOCABULARY}")
    names += [f"word{number}" for number in range(len(names), VOCABULARY)]
    ids = {name: place for place, name in enumerate(names)}
    _write_model(recipe, ids, directory, seed)
    _tokenizer(recipe, ids).save_pretrained(directory)
    recipe.image_processor().save_pretrained(directory)
    _write_json(directory / "processor_config.json", {"processor_class": recipe.processor, **recipe.settings})
    if recipe.frames:
        _write_json(directory / "video_preprocessor_config.json", recipe.frames)
    return directory


def picture(seed: int, height: int, width: int) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(_noise(seed, height, width))


def video(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """Frames of noise, ``(frames, height, width, 3)``."""
    return _noise(seed, frames, height, width)


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8)


def ask(
    processor: Any,
    images: Sequence[Sequence[Image.Image]],
    videos: Sequence[Sequence[np.ndarray]] | None = None,
) -> dict[str, Tensor]:
    """A left-padded batch for ``generate``: one question for every row of ``images`` (and of ``videos``), of another
    length in each, about the row's videos and pictures."""
    films = videos or [()] * len(images)
    conversations = []
    for number, (shown, played) in enumerate(zip(images, films, strict=True)):
        question = " ".join(_WORDS.split()[number : 2 * number + 3])
        parts = [{"type": "video"} for _ in played] + [{"type": "image"} for _ in shown]
        conversations.append([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])
    features = processor(
        text=processor.apply_chat_template(conversations, add_generation_prompt=True),
        images=[list(row) for row in images] if any(images) else None,
        **({"videos": [film for row in films for film in row]} if any(map(len, films)) else {}),
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the template writes them
        return_tensors="pt",
    )
    # PaliGemma's processor prepares training targets too.
    return {name: value for name, value in features.items() if isinstance(value, Tensor) and name != "labels"}


def _write_json(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(settings), indent=2) + "\n")


def _write_model(recipe: Recipe, ids: Ids, directory: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(recipe.config(ids))
    draw_weights(model, seed)
    with torch.no_grad():
        for token in (*_SPECIAL, *recipe.tokens):
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
        chat_template=recipe.template and recipe.template.replace("IMAGE", recipe.image).replace("VIDEO", recipe.video),
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


_SIZE = {"height": 32, "width": 32}
_PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
_CLIP_PICTURES = {"size": {"shortest_edge": 32}, "crop_size": _SIZE}
_CLIP_FRAMES = {
    **_CLIP_PICTURES,
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SQUARE_FRAMES = {"size": _SIZE, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLASS_TOKEN = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def _llava(tower: type[PreTrainedConfig]) -> Callable[[Ids], PreTrainedConfig]:
    return lambda ids: LlavaConfig(
        vision_config=tower(**_vision()),
        text_config=LlamaConfig(**_text()),
        image_token_index=ids["<image>"],
        image_seq_length=16,
        vision_feature_select_strategy="default" if tower is CLIPVisionConfig else "full",
    )


def _llava_next(ids: Ids) -> PreTrainedConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text()),
        image_token_index=ids["<image>"],
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )


def _llava_next_video(ids: Ids) -> PreTrainedConfig:
    return LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text()),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
        video_seq_length=4,
    )


def _video_llava(ids: Ids) -> PreTrainedConfig:
    return VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=LlamaConfig(**_text()),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_seq_length=16,
        video_seq_length=17 * 4,
    )


def _llava_onevision(ids: Ids) -> PreTrainedConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_vision(), vision_use_head=False),
        text_config=Qwen2Config(**_text()),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_2",  # four tiles are interpolated down to two tiles' worth of tokens
    )


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_QWEN_SIZE = {"shortest_edge": 4 * 256, "longest_edge": 20 * 256}  # 4 to 20 tokens of 16 x 16 pixels


def _qwen_ids(ids: Ids) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _qwen2_vl(ids: Ids) -> PreTrainedConfig:
    return Qwen2VLConfig(
        vision_config={
            "depth": 4,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 8,
        },
        text_config=_text(rope_parameters=dict(_QWEN_ROPE)),
        **_qwen_ids(ids),
    )


def _qwen2_5_vl(ids: Ids) -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "window_size": 32,  # 2 x 2 tokens: any larger picture has several windows, and its patches are permuted
            "fullatt_block_indexes": [1, 3],
        },
        text_config=_text(rope_parameters=dict(_QWEN_ROPE)),
        **_qwen_ids(ids),
    )


def _qwen3_vl(ids: Ids) -> PreTrainedConfig:
    return Qwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
        text_config=_text(head_dim=16, rope_parameters={**_QWEN_ROPE, "mrope_interleaved": True}),
        **_qwen_ids(ids),
    )


def _qwen(config: Callable[[Ids], PreTrainedConfig], processor: str) -> Recipe:
    return Recipe(
        processor=processor,
        config=config,
        image_processor=lambda: Qwen2VLImageProcessorPil(patch_size=8, size=dict(_QWEN_SIZE)),
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        tokens=_QWEN_TOKENS,
        frames={"size": _QWEN_SIZE, "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2},
    )


def _internvl(ids: Ids) -> PreTrainedConfig:
    return InternVLConfig(
        vision_config=_vision(image_size=[32, 32], patch_size=[8, 8], layer_scale_init_value=1.0),
        text_config=Qwen2Config(**_text()),
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )


_IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
_IDEFICS_PICTURES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}  # 2 x 2 tiles at most


def _idefics(kind: type[PreTrainedConfig]) -> Callable[[Ids], PreTrainedConfig]:
    return lambda ids: kind(
        vision_config=_vision(),
        text_config=LlamaConfig(**_text()),
        image_token_id=ids["<image>"],
        pad_token_id=ids["<pad>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _paligemma(**text: Any) -> Callable[[Ids], PreTrainedConfig]:
    return lambda ids: PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_vision(), vision_use_head=False, projection_dim=64),
        text_config=_text(head_dim=16, **text),
        image_token_index=ids["<image>"],
        projection_dim=64,
        hidden_size=64,
        tie_word_embeddings=False,
    )


def _gemma3(ids: Ids) -> PreTrainedConfig:
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**_vision(image_size=64), vision_use_head=False),
        text_config=_text(
            head_dim=16,
            query_pre_attn_scalar=16,
            num_hidden_layers=6,
            sliding_window=20,  # more than a picture's tokens, less than a prompt
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        ),
        mm_tokens_per_image=16,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        tie_word_embeddings=False,
    )


RECIPES: Mapping[str, Recipe] = {
    "llava": Recipe(
        processor="LlavaProcessor",
        config=_llava(CLIPVisionConfig),
        image_processor=lambda: CLIPImageProcessorPil(**_CLIP_PICTURES),
        settings=_CLASS_TOKEN,
    ),
    "llava_siglip": Recipe(
        processor="LlavaProcessor",
        config=_llava(SiglipVisionConfig),
        image_processor=lambda: SiglipImageProcessorPil(size=_SIZE),
        settings={"patch_size": 8, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
    ),
    "llava_next": Recipe(
        processor="LlavaNextProcessor",
        config=_llava_next,
        image_processor=lambda: LlavaNextImageProcessorPil(**_CLIP_PICTURES, image_grid_pinpoints=_PINPOINTS),
        settings=_CLASS_TOKEN,
    ),
    "llava_next_video": Recipe(
        processor="LlavaNextVideoProcessor",
        config=_llava_next_video,
        image_processor=lambda: LlavaNextImageProcessorPil(**_CLIP_PICTURES, image_grid_pinpoints=_PINPOINTS),
        video="<video>",
        tokens=("<image>", "<video>"),
        settings=_CLASS_TOKEN,
        frames=_CLIP_FRAMES,
    ),
    "video_llava": Recipe(
        processor="VideoLlavaProcessor",
        config=_video_llava,
        image_processor=lambda: VideoLlavaImageProcessor(**_CLIP_PICTURES),
        video="<video>",
        tokens=("<image>", "<video>"),
        settings=_CLASS_TOKEN,
        frames=_CLIP_FRAMES,
    ),
    "llava_onevision": Recipe(
        processor="LlavaOnevisionProcessor",
        config=_llava_onevision,
        image_processor=lambda: LlavaOnevisionImageProcessorPil(size=_SIZE, image_grid_pinpoints=_PINPOINTS),
        video="<video>",
        tokens=("<image>", "<video>"),
        settings={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        },
        frames=_SQUARE_FRAMES,
    ),
    "qwen2_vl": _qwen(_qwen2_vl, "Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen(_qwen2_5_vl, "Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen(_qwen3_vl, "Qwen3VLProcessor"),
    "internvl": Recipe(
        processor="InternVLProcessor",
        config=_internvl,
        image_processor=lambda: GotOcr2ImageProcessorPil(size=_SIZE, crop_to_patches=True, max_patches=4),
        image="<IMG_CONTEXT>",
        video="<video>",
        tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        settings={"image_seq_length": 4},
        frames=_SQUARE_FRAMES,
    ),
    "idefics3": Recipe(
        processor="Idefics3Processor",
        config=_idefics(Idefics3Config),
        image_processor=lambda: Idefics3ImageProcessorPil(**_IDEFICS_PICTURES),
        tokens=_IDEFICS_TOKENS,
        settings={"image_seq_len": 4},
    ),
    "smolvlm": Recipe(
        processor="SmolVLMProcessor",
        config=_idefics(SmolVLMConfig),
        image_processor=lambda: SmolVLMImageProcessorPil(**_IDEFICS_PICTURES),
        video="<video>",
        tokens=(*_IDEFICS_TOKENS, "<video>"),
        settings={"image_seq_len": 4},
        frames={**_SQUARE_FRAMES, **_IDEFICS_PICTURES},
    ),
    "paligemma": Recipe(
        processor="PaliGemmaProcessor",
        config=_paligemma(model_type="gemma"),
        image_processor=lambda: SiglipImageProcessorPil(size=_SIZE, image_seq_length=16),
        template=None,
    ),
    "paligemma2": Recipe(
        processor="PaliGemmaProcessor",
        config=_paligemma(model_type="gemma2", query_pre_attn_scalar=16, sliding_window=64),  # wider than its prompts
        image_processor=lambda: SiglipImageProcessorPil(size=_SIZE, image_seq_length=16),
        template=None,
        attention="eager",
    ),
    "gemma3": Recipe(
        processor="Gemma3Processor",
        config=_gemma3,
        image_processor=lambda: Gemma3ImageProcessorPil(size={"height": 64, "width": 64}),
        image="<start_of_image>",
        tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        settings={"image_seq_length": 16},
    ),
}
