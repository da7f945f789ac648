"""What makes two runs the same: everything that can change an answer, and nothing else.

Not in it, on purpose: how many samples are taken (a shorter run is a prefix of a longer one), where results are
written, how they are tracked, and how jobs are started.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.reducer import TokenReducer

_CHUNK = 1 << 22
_LIBRARIES = ("torch", "transformers", "tokenreduce")
_CORE = (
    "reducer.py",
    "chain.py",
    "signals.py",
    "flops.py",
    "attach",
    "models",
    "benchmarks/scoring.py",
    "benchmarks/tabular.py",
    "evaluation/costs.py",
    "evaluation/prompts.py",
    "evaluation/runner.py",
    "evaluation/vision_memory.py",
)
"""Parts of this package that a run's answers come from: while they are worked on, the version alone does not tell."""


def run_identity(
    model: PreTrainedModel,
    processor: Any,
    benchmark: Benchmark,
    reducer: TokenReducer | Mapping[str, Any],
    *,
    batch_size: int,
    max_new_tokens: int,
    prompt: str,
) -> dict[str, Any]:
    """Everything that a run's answers depend on, as plain data.

    ``reducer`` is an instance, or a description where different samples get different ones.
    """
    identity = {
        "reducer": reducer_identity(reducer) if isinstance(reducer, TokenReducer) else dict(reducer),
        "model": model_identity(model),
        "processor": processor_identity(processor),
        "benchmark": benchmark_identity(benchmark),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "prompt": prompt,
        "versions": {name: _version(name) for name in _LIBRARIES},
        "core": _core_digest(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def content_hash(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for an identity."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def reducer_identity(reducer: TokenReducer) -> dict[str, Any]:
    """The method's class, its settings and a digest of its source."""
    sources = [source_digest(type(part)) for part in reducer.parts()]
    return {"class": _qualified(type(reducer)), "knobs": reducer.knobs(), "source": " ".join(sources)}


def benchmark_identity(benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark's class, its settings, a digest of its source, and its data's own fingerprint."""
    return {
        "class": _qualified(type(benchmark)),
        "knobs": benchmark.knobs(),
        "source": source_digest(type(benchmark)),
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
        weights = {"files": _folder_digest(Path(name))}
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
    return {"class": type(processor).__name__, "digest": _digest(part.encode() for part in parts)}


def source_digest(cls: type) -> str:
    """A digest of the file that defines ``cls``, or of the whole package where that is an ``__init__``."""
    try:
        path = Path(inspect.getfile(cls))
    except (OSError, TypeError):  # made in an interactive session: there is no file
        return "no source file"
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return _files_digest(path.parent, files)


def _tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer computes, less its padding and truncation, which every call sets anew."""
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


def _folder_digest(folder: Path) -> str:
    """Names and contents of a checkpoint's files; each file is read once in a process, unless it changes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    parts = []
    for path in files:
        status = path.stat()
        parts.append(f"{path.relative_to(folder).as_posix()}:{_file_digest(path, status.st_size, status.st_mtime_ns)}")
    return _digest(part.encode() for part in parts)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


@cache
def _file_digest(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return _digest(iter(lambda: file.read(_CHUNK), b""))


def _files_digest(root: Path, files: Iterable[Path]) -> str:
    return _digest(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes() for path in files)


def _memory_digest(model: PreTrainedModel) -> str:
    def parts() -> Iterable[bytes]:
        yield model.config.to_json_string().encode()
        for name, tensor in model.state_dict().items():
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return _digest(parts())


@cache
def _core_digest() -> str:
    root = Path(__file__).parents[1]
    files = [root / part for part in _CORE]
    return _files_digest(
        root, [each for path in files for each in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _qualified(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
