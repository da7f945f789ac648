"""Checkpoints: from a directory, the Hugging Face hub, or this package, by the same two transformers calls."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tokenreduce.models.family import family_of
from tokenreduce.models.processing import processor_of
from tokenreduce.registry import MODELS

EMBEDDED = "tiny"
"""The name, in place of a path, of the checkpoint that comes with this package."""

_HUB_TIMEOUT = 10.0
_HUB_REFUSALS = (HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError)


def load(
    path: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "sdpa",
    device_map: str | None = None,
    compiler: str | None = None,
    do_pad: bool | None = None,
    image: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model in evaluation mode and its processor.

    ``path`` is a directory, a name on the Hugging Face hub, or ``"tiny"``; ``attention`` names a kernel as transformers
    does. A ``device_map`` such as ``"auto"`` spreads the model over all GPUs, in place of ``device``; a ``compiler``,
    one of torch.compile's backends, compiles the language model's feed-forward networks, the part that no reducer looks
    into. ``do_pad`` overrides whether pictures are squared by padding, as LLaVA-1.5 was trained, and not by cropping;
    ``image`` other settings of the image processor, such as ``{"max_patches": 6}`` for InternVL's tiles.
    Raises ``ValueError`` for a checkpoint, precision or device that cannot be used, saying what can.
    """
    precision = _precision(dtype)
    _check_device(device)
    MODELS.usable()  # a family's package may hold classes of its own, which transformers knows once it is imported
    source, options = _locate(path, revision)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path={path!r} holds no checkpoint that transformers can read: {_first_line(error)}"
        ) from error
    _check_supported(path, config)
    try:
        processor = processor_of(source, **options)
    except ImportError as error:
        raise ValueError(f"the processor of model.path={path!r} cannot be made here: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"the processor of model.path={path!r} cannot be loaded: {_first_line(error)}") from error
    try:
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=precision,
            attn_implementation=attention,
            device_map=device_map,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        setting = f"attention={attention!r}" + (f" or device_map={device_map!r}" if device_map else "")
        raise ValueError(f"{setting} cannot be used here: {_first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "attention implementation" in str(error):
            raise ValueError(
                f"this model cannot do with attention={attention!r}: use runtime.attention=eager"
            ) from error
        raise ValueError(f"the checkpoint in model.path={path!r} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would draw them at random
        raise ValueError(
            f"the checkpoint in model.path={path!r} lacks {len(missing)} of the weights of {type(model).__name__}, "
            f"such as {missing[0]}"
        )
    processor.tokenizer.padding_side = "left"
    if do_pad is not None:
        processor.image_processor = _padding(processor.image_processor, do_pad)
    if image:
        processor.image_processor = _with_settings(processor.image_processor, image)
    if compiler is not None:
        _compile(model, compiler)
    return (model if device_map else model.to(device)).eval(), processor


def supported_classes() -> list[str]:
    """The transformers classes that some installed model family serves."""
    return sorted(name for family in MODELS.usable().values() for name in family.classes)


def _locate(path: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Where transformers finds ``path``, and the options to ask it with."""
    if path == EMBEDDED:
        return str(resources.files("tokenreduce") / "assets" / "tiny_vlm"), {"local_files_only": True}
    directory = Path(path).expanduser()
    if directory.is_dir():
        return str(directory), {"local_files_only": True}
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ValueError(
            f"model.path={path!r} is no directory; give a checkpoint's directory, or a name OWNER/NAME on the hub"
        )
    options: dict[str, Any] = {"revision": revision or "main"}
    try:
        HfApi().model_info(path, timeout=_HUB_TIMEOUT, **options)
    except _HUB_REFUSALS as error:
        raise ValueError(
            f"the Hugging Face hub does not give {path!r} at revision {options['revision']!r}: {_first_line(error)}\n"
            "Check the name and your access, or give a checkpoint's directory: model.path=DIRECTORY"
        ) from error
    except Exception as error:  # no network: what the HTTP client raises is its own affair, and varies with its version
        options["local_files_only"] = True
        try:
            AutoConfig.from_pretrained(path, **options)
        except (OSError, ValueError):
            raise ValueError(
                f"{path!r} is not on this machine, and the Hugging Face hub cannot be reached: {_first_line(error)}\n"
                "Download it where there is a network and give its directory: model.path=DIRECTORY"
            ) from error
    return path, options


def _check_supported(path: str, config: Any) -> None:
    names = list(config.architectures or [])
    supported = supported_classes()
    if not set(names) & set(supported):
        found = " and ".join(names) or f"a {config.model_type} model of no stated class"
        raise ValueError(
            f"model.path={path!r} holds {found}, which is not supported\nSupported: {', '.join(supported)}"
        )


def _precision(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in dtypes:
        raise ValueError(f"unknown dtype {name!r}: known: {', '.join(dtypes)}")
    return dtypes[name]


def _check_device(device: str) -> None:
    kind = device.split(":")[0]
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in usable:
        raise ValueError(f"unknown device {device!r}: known: {', '.join(usable)}")
    if not usable[kind]:
        raise ValueError(f"torch finds no {kind!r} device on this machine; runtime=cpu always works")


def _compile(model: PreTrainedModel, compiler: str) -> None:
    """Compile the decoder layers' feed-forward networks, for any number of tokens."""
    known = torch.compiler.list_backends(())
    if compiler not in known:
        raise ValueError(f"unknown compiler {compiler!r}: known: {', '.join(known)}")
    layers: Any = family_of(model, MODELS.usable()).decoder.layers
    for layer in layers:
        layer.mlp.compile(backend=compiler, dynamic=True)


def _padding(image_processor: Any, do_pad: bool) -> Any:
    """LLaVA's own image processor with this setting: the CLIP one that its checkpoints name cannot pad."""
    if not isinstance(image_processor, LlavaImageProcessorPil):
        if "CLIP" not in type(image_processor).__name__:
            raise ValueError(
                f"do_pad={do_pad} is for LLaVA-1.5, not for a {type(image_processor).__name__}: use model.do_pad=null"
            )
        settings = {name: value for name, value in image_processor.to_dict().items() if name != "image_processor_type"}
        image_processor = LlavaImageProcessorPil(**settings)
    image_processor.do_pad = do_pad
    return image_processor


def _with_settings(image_processor: Any, settings: Mapping[str, Any]) -> Any:
    """The image processor with other settings."""
    kind, own = type(image_processor), image_processor.to_dict()
    if unknown := [name for name in settings if not hasattr(image_processor, name)]:
        raise ValueError(f"a {kind.__name__} has no {', '.join(unknown)}: its settings are {', '.join(sorted(own))}")
    kept = {name: value for name, value in own.items() if not name.endswith("_type")}
    for name, value in settings.items():  # of sizes, those that are not named stay
        kept[name] = {**own[name], **value} if isinstance(value, Mapping) and name in own else value
    return kind(**kept)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
