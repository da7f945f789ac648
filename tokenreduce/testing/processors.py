"""A small processor for the small models, so that whole evaluations run with nothing downloaded."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerFast

from tokenreduce.testing.models import VOCABULARY

_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>", "USER:", "ASSISTANT:")
_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_processor(model: PreTrainedModel, words: Iterable[str] = ()) -> LlavaProcessor:
    """A processor for :func:`~tokenreduce.testing.models.tiny_llava` whose vocabulary holds ``words``."""
    names = [*_SPECIAL, *words]
    if len(names) > VOCABULARY:
        raise ValueError(f"{len(names)} words and special tokens do not fit the vocabulary of {VOCABULARY}")
    names += [f"word{number}" for number in range(len(names), VOCABULARY)]
    backend = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vision = model.config.vision_config
    class_token = vision.model_type.startswith("clip")
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            extra_special_tokens=["<image>"],
        ),
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
        chat_template=_TEMPLATE,
        image_token="<image>",
    )
