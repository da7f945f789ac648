"""Processors, for every installation: without torchvision too, where transformers refuses to make those that also read
videos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import get_video_processor_config
from transformers.utils import is_torchvision_available

from tokenreduce.models.videos import VideoFrames

_PICTURES_AND_TEXT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def processor_of(path: str | Path, **options: Any) -> Any:
    """A checkpoint's processor, with pictures prepared by PIL (torchvision resizes to other pixels).

    A processor that has a video processor cannot be loaded without torchvision. There the checkpoint's own processor
    class is put together from its image processor, its tokenizer and :class:`~tokenreduce.models.videos.VideoFrames`:
    images and text are prepared exactly as ever. PaliGemma, whose checkpoints have no chat template, gets one that
    writes what it was trained on: the pictures, and the bare text. ``options`` are those of ``from_pretrained``.
    """
    processor = _processor_of(path, options)
    if type(processor).__name__ == "PaliGemmaProcessor" and processor.chat_template is None:
        processor.chat_template = _PICTURES_AND_TEXT
    return processor


def _processor_of(path: str | Path, options: Mapping[str, Any]) -> Any:
    kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(path, **options)), None)
    if kind is None or "video_processor" not in kind.get_attributes() or is_torchvision_available():
        return AutoProcessor.from_pretrained(path, backend="pil", **options)
    image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    settings = get_video_processor_config(path, **options)
    parts = {
        "image_processor": image_processor,
        "tokenizer": AutoTokenizer.from_pretrained(path, **options),
        "video_processor": VideoFrames(kind.__name__, image_processor, settings),
    }
    own, _ = kind.get_processor_dict(path, **options)
    return _without_torchvision(kind).from_args_and_dict([parts[name] for name in kind.get_attributes()], own)


def _without_torchvision(kind: type[Any]) -> type[Any]:
    """``kind``, with a video processor of any class; transformers' own base class needs torchvision."""

    def check(self: Any, name: str, part: Any) -> Any:
        return type(part) if name == "video_processor" else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__doc__": kind.__doc__})
