"""The recipe of a family's small random-weight checkpoint, on which every check of the family runs, and the settings
that several families' recipes have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["VOCABULARY", "Ids", "Recipe", "text_settings", "vision_settings"]

VOCABULARY = 192
"""How many tokens the language model of every small checkpoint has."""

Ids = Mapping[str, int]
"""The token id of every word."""


@dataclass(frozen=True)
class Recipe:
    """How a small checkpoint is made.

    model, processor: the names of the transformers classes.
    config:           makes the model's configuration.
    image_processor:  makes the image processor.
    image, video:     what a prompt says in the place of one; no video where the model takes none.
    tokens:           the special tokens of the vocabulary.
    named:            those of them that the processor reads from its tokenizer by name.
    settings:         the processor's own settings.
    frames:           those of its video processor; none where it has none.
    chat:             true if the checkpoint has a chat template.
    attention:        a kernel that the model can do with.
    """

    model: str
    processor: str
    config: Callable[[Ids], PreTrainedConfig]
    image_processor: Callable[[], Any]
    image: str = "<image>"
    video: str = ""
    tokens: tuple[str, ...] = ("<image>",)
    named: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    frames: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = True
    attention: str = "sdpa"


def text_settings(**changes: Any) -> dict[str, Any]:
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


def vision_settings(**changes: Any) -> dict[str, Any]:
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


SIZE: Mapping[str, Any] = {"height": 32, "width": 32}
"""The size of such a tower's pictures."""
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
"""The sizes that pictures cut into tiles are brought to."""
CLIP_PICTURES: Mapping[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": SIZE}
CLIP_FRAMES: Mapping[str, Any] = {
    **CLIP_PICTURES,
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SQUARE_FRAMES: Mapping[str, Any] = {"size": SIZE, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLASS_TOKEN: Mapping[str, Any] = {
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
"""The settings of a processor whose model's tower has a class token and drops it."""
