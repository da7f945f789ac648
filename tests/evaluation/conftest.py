"""A small model, and a benchmark of its own making: what an evaluation needs, in a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.testing.models import tiny_llava
from tokenreduce.testing.processors import tiny_processor

collect_ignore = ["worker.py"]  # a program that tests start

WORDS = ("what", "is", "in", "the", "picture", "top", "left", "color")


@dataclass(frozen=True)
class Cards(Benchmark):
    """Noise pictures, three questions each. An answer's score is a checksum of it, so that different ones differ."""

    description: ClassVar[str] = "noise"

    count: int = 24
    seed: int = 0
    broken: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        words = " ".join(WORDS[: 2 + index % 5])
        return Sample(f"card-{index}", f"{words} ?", ("word9",), ("odd", "even")[index % 2], f"image-{index // 3}")

    def images(self, sample: Sample) -> list[Image.Image]:
        number = int(sample.image_id.split("-")[1])
        if number in self.broken:
            raise OSError(f"image file {sample.image_id}.png is truncated")
        noise = np.random.default_rng((self.seed, number)).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        return [Image.fromarray(noise)]

    def score(self, answer: str, sample: Sample) -> float:
        return crc32(answer.encode()) % 5 / 4


def make_model() -> LlavaForConditionalGeneration:
    return tiny_llava()


def make_processor(model: LlavaForConditionalGeneration) -> LlavaProcessor:
    return tiny_processor(model, WORDS)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model() -> LlavaForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="session")
def processor(model: LlavaForConditionalGeneration) -> LlavaProcessor:
    return make_processor(model)


@pytest.fixture
def cards() -> type[Cards]:
    return Cards
