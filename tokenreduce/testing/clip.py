"""A small random-weight CLIP checkpoint, for reducers that read the question."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from tokenreduce.testing.models import draw_weights

SEGMENT = 16
"""How many tokens its text tower takes at once."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_WORDS = "what which how many is are there the a in colour shape red green blue square circle picture ?"


def write_clip(directory: str | Path, *, width: int = 32, words: Iterable[str] = (), seed: int = 0) -> Path:
    """Write a CLIP model for vision encoders of ``width``, with its tokenizer, and return its directory."""
    directory = Path(directory)
    names = list(dict.fromkeys([*_SPECIAL, *_WORDS.split(), *words]))
    tower = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 24}
    config = CLIPConfig(
        text_config={
            **tower,
            "hidden_size": 32,
            "vocab_size": len(names),
            "max_position_embeddings": SEGMENT,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**tower, "hidden_size": width, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
    draw_weights(model, seed)
    model.save_pretrained(directory)

    backend = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=SEGMENT,
    ).save_pretrained(directory)
    return directory
