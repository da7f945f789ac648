"""Random-weight checkpoints of every supported model family, written to a directory and loaded as real ones are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from tokenreduce.models.family import ModelFamily
from tokenreduce.models.recipe import VOCABULARY, Ids, Recipe
from tokenreduce.registry import MODELS
from tokenreduce.testing.models import draw_weights

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
"""The chat template, with IMAGE and VIDEO where a recipe's own words go."""


def recipes(families: Mapping[str, type[ModelFamily]] | None = None) -> dict[str, Recipe]:
    """The recipes of some model families, by default of all that are installed, by name; of two with one name the
    first, built-in ones before others.

    A family whose recipes cannot be made has none, and a warning says why.
    """
    found: dict[str, Recipe] = {}
    for name, family in (MODELS.usable() if families is None else families).items():
        try:
            own = family.recipes()
        except Exception as error:  # a class that the installed transformers lacks, or anything in others' code
            warnings.warn(
                f"the recipes of model family {name!r} cannot be made: {type(error).__name__}: {error}", stacklevel=2
            )
            continue
        for checkpoint, recipe in own.items():
            if recipe.model in family.classes:  # a derived family inherits recipes of classes that it does not serve
                found.setdefault(checkpoint, recipe)
    return found


def write_checkpoint(recipe: Recipe | str, directory: str | Path, *, seed: int = 0, words: Iterable[str] = ()) -> Path:
    """Write a small random-weight checkpoint by a recipe, with its processor, and return its directory.

    Its vocabulary holds ``words`` beside those for its own prompts. It never ends an answer and never answers with a
    special token. Raises ``ValueError`` for a name that no installed family has a recipe for.
    """
    directory = Path(directory)
    if isinstance(recipe, str):
        known = recipes()
        if recipe not in known:
            raise ValueError(f"there is no tiny checkpoint of {recipe!r}: known: {', '.join(known)}")
        recipe = known[recipe]
    names = list(dict.fromkeys([*_SPECIAL, *recipe.tokens, "USER:", "ASSISTANT:", *_WORDS.split(), "\n", *words]))
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
        **({"videos": [list(row) for row in films]} if any(map(len, films)) else {}),
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
    spaces = pre_tokenizers.Split(" ", "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split("\n", "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[token for token in recipe.tokens if token not in recipe.named.values()],
        model_specific_special_tokens=dict(recipe.named),
        chat_template=_CHAT.replace("IMAGE", recipe.image).replace("VIDEO", recipe.video) if recipe.chat else None,
        padding_side="left",
    )
