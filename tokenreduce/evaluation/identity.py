"""The identity of a run: everything that can change an answer, and nothing else.

Not in it, on purpose: how many samples are taken (a shorter run is a prefix of a longer one), where results are
written, how they are tracked, and how jobs are started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenreduce import fingerprint
from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.reducer import TokenReducer

_LIBRARIES = ("torch", "transformers", "tokenreduce")


def run_identity(
    answering: Mapping[str, Any],
    benchmark: Benchmark,
    reducer: TokenReducer | Mapping[str, Any],
    *,
    batch_size: int,
    max_new_tokens: int,
    prompt: str,
) -> dict[str, Any]:
    """Everything that a run's answers depend on, as plain data.

    ``answering`` is what a back end says of itself (:meth:`tokenreduce.evaluation.backend.MeasuredBackend.identity`).
    ``reducer`` is an instance, or a description where different samples get different ones.
    """
    identity = {
        "reducer": reducer_identity(reducer) if isinstance(reducer, TokenReducer) else dict(reducer),
        **answering,
        "benchmark": benchmark_identity(benchmark),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "prompt": prompt,
        "versions": {name: _version(name) for name in _LIBRARIES},
        "core": fingerprint.library(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def content_hash(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for an identity."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def reducer_identity(reducer: TokenReducer) -> dict[str, Any]:
    """The method's class and settings, and digests of its code and of the files that its settings name."""
    return {
        "class": fingerprint.qualified(type(reducer)),
        "knobs": reducer.knobs(),
        "source": fingerprint.code(reducer),
        "files": fingerprint.files(reducer),
    }


def benchmark_identity(benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark's class and settings, digests of its code and of the files that its settings name, and its data's
    own fingerprint."""
    return {
        "class": fingerprint.qualified(type(benchmark)),
        "knobs": benchmark.knobs(),
        "source": fingerprint.code(benchmark),
        "files": fingerprint.files(benchmark),
        "data": benchmark.fingerprint(),
    }


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """The weights, and how they are run.

    A local checkpoint is known by the names and contents of its files (not by its path), one of a hub by its name and
    commit, and a model that was made in memory by its configuration and weights.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    commit = getattr(model.config, "_commit_hash", None)
    if name and Path(name).is_dir():
        weights = {"files": fingerprint.folder_digest(Path(name))}
    elif name and commit:
        weights = {"name": name, "revision": str(commit)}
    else:
        weights = {"memory": _memory_digest(model)}
    return {
        "class": type(model).__name__,
        **weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": str(model.config._attn_implementation),
        # Compiled code may round otherwise.
        **({"compiled": True} if any(module._compiled_call_impl for module in model.modules()) else {}),
    }


def processor_identity(processor: Any) -> dict[str, Any]:
    """The processor's classes and a digest of all its settings: template, image size, vocabulary."""
    settings = processor.to_dict() if hasattr(processor, "to_dict") else {}
    parts = [type(processor).__qualname__, _plain(settings), str(getattr(processor, "chat_template", None))]
    if (image_processor := getattr(processor, "image_processor", None)) is not None:
        parts += [type(image_processor).__qualname__, _plain(image_processor.to_dict())]
    if (tokenizer := getattr(processor, "tokenizer", None)) is not None:
        parts += [type(tokenizer).__qualname__, _plain(_tokenizer_content(tokenizer))]
    return {"class": type(processor).__name__, "digest": fingerprint.digest(part.encode() for part in parts)}


def _tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's settings, less its padding and truncation, which every call sets anew."""
    content: dict[str, Any] = {"special": tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return content | {"vocabulary": tokenizer.get_vocab()}
    settings = json.loads(backend.to_str())
    return content | {name: value for name, value in settings.items() if name not in ("padding", "truncation")}


def _plain(settings: Any) -> str:
    """JSON of settings whose paths and lazily filled fields do not count."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                str(key): cleaned(each) for key, each in value.items() if key not in ("name_or_path", "_name_or_path")
            }
        return [cleaned(each) for each in value] if isinstance(value, list | tuple) else value

    return json.dumps(cleaned(settings), sort_keys=True, default=str)


def _memory_digest(model: PreTrainedModel) -> str:
    def parts() -> Iterable[bytes]:
        yield model.config.to_json_string().encode()
        for name, tensor in model.state_dict().items():
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return fingerprint.digest(parts())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
