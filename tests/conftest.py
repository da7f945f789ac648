"""Fixtures shared by all tests: small random-weight models, and one thread (the machine may be small, the models
are)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tokenreduce import create
from tokenreduce.catalog.description import example
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import REDUCERS
from tokenreduce.testing import tiny_llava
from tokenreduce.testing.checkpoints import write_checkpoint
from tokenreduce.testing.clip import write_clip

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava() -> LlavaForConditionalGeneration:
    """A CLIP + Llama model of 36 visual tokens. Shared: tests leave it as they found it."""
    return tiny_llava()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint, written once."""
    written: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in written:
            written[family] = write_checkpoint(family, tmp_path_factory.mktemp(family))
        return written[family]

    return directory


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint for vision encoders as wide as those of all the small models."""
    return write_clip(tmp_path_factory.mktemp("clip"), width=32)


@pytest.fixture(scope="session")
def made(clip: Path) -> Callable[[str], TokenReducer]:
    """Any reducer by its name, with its own settings or those of a preset; what it loads is a small checkpoint."""

    def made(name: str) -> TokenReducer:
        if any(field.name == "clip" for field in dataclasses.fields(REDUCERS.get(name))):
            return create(name, clip=str(clip))
        reducer = example(name, REDUCERS.get(name))
        assert reducer is not None, f"{name} has knobs without default, and no preset sets them"
        return reducer

    return made
