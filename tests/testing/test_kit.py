"""What the kit offers beside the invariants: benchmark checks that find a mistake, and tokens made by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.reducer import Grid
from tokenreduce.signals import ClassToken
from tokenreduce.testing import InvariantError, check_benchmark, visual_tokens


@dataclass(frozen=True)
class Cards(Benchmark):
    """Coloured cards; each test breaks one promise of theirs."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"card-{index}", "Is it dark?", ("yes",), "cards", f"image-{index // 2}")

    def images(self, sample: Sample) -> list[Image.Image]:
        return [Image.new("RGB", (4, 4), (0, 0, 9 * int(sample.image_id[-1])))]


class SameId(Cards):
    def __getitem__(self, index: int) -> Sample:
        return Sample("card", "Is it dark?", ("yes",), "cards", "image")


class Empty(Cards):
    def __len__(self) -> int:
        return 0


class WrongImages(Cards):
    def images(self, sample: Sample) -> list[Image.Image]:
        return [Image.new("RGB", (4, 4), (0, 0, 9 * int(sample.id[-1])))]


class NoImages(Cards):
    def images(self, sample: Sample) -> list[Image.Image]:
        return ["a path"]  # type: ignore[list-item]


class Deaf(Cards):
    def score(self, answer: str, sample: Sample) -> float:
        return 0.0


class Generous(Cards):
    def score(self, answer: str, sample: Sample) -> float:
        return 100.0


def test_a_benchmark_that_behaves_passes() -> None:
    check_benchmark(Cards())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (SameId, "the sample id 'card' is used more than once"),
        (Empty, "has no samples"),
        (WrongImages, "share the image_id 'image-0' and no image"),
        (NoImages, "shows a str, not a PIL image"),
        (Deaf, "scores above an empty answer"),
        (Generous, "scores 100.0, outside"),
    ],
)
def test_a_broken_promise_of_a_benchmark_is_found(broken: type[Benchmark], message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        check_benchmark(broken())


def test_tokens_made_by_hand_show_what_they_were_given() -> None:
    tokens = visual_tokens(torch.zeros(6, 2), 3, grid=Grid(2, 3), signals={ClassToken(): "the class token"})
    assert (len(tokens), tokens.keep, tokens.span.grid, tokens[ClassToken()]) == (6, 3, Grid(2, 3), "the class token")
    assert visual_tokens(torch.zeros(6, 2)).adaptive
    with pytest.raises(ValueError, match="12 places for 6 tokens"):
        visual_tokens(torch.zeros(6, 2), grid=Grid(3, 4))
