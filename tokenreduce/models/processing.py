"""Processors, for every installation: without torchvision too, where the classes that also read videos cannot be
made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


def processor_of(path: str | Path, **options: Any) -> Any:
    """A checkpoint's processor, with pictures prepared by PIL (torchvision's own resizing gives other pixels).

    Processors with a video processor cannot be made without torchvision. There the checkpoint's own processor class is
    assembled from its image processor and tokenizer, and prepares images and text as it always does.
    ``options`` are those of ``from_pretrained``.
    """
    kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(path, **options)), None)
    if kind is None or "video_processor" not in kind.get_attributes() or is_torchvision_available():
        return AutoProcessor.from_pretrained(path, backend="pil", **options)
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil", **options),
        "tokenizer": AutoTokenizer.from_pretrained(path, **options),
        "video_processor": None,
    }
    settings, _ = kind.get_processor_dict(path, **options)
    return _without_torchvision(kind).from_args_and_dict([parts[name] for name in kind.get_attributes()], settings)


def _without_torchvision(kind: type[Any]) -> type[Any]:
    """``kind``, which takes a video processor of any class; transformers' own base class needs torchvision."""

    def check(self: Any, name: str, part: Any) -> Any:
        return type(part) if name == "video_processor" else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__doc__": kind.__doc__})
