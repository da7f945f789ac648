"""What a benchmark is: samples with a question about images, and a score for an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One question.

    ``id`` is unique and stable; an image's samples share ``image_id``, by which statistics cluster. ``problem`` says
    why the question cannot be asked, if so: a run goes on without it.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    category: str
    image_id: str
    problem: str = ""


class QuestionError(ValueError):
    """A question that no model, or not this one, can be asked."""


class Benchmark(ABC):
    """Questions about images. Subclasses are frozen dataclasses: their fields are their knobs.

    Sample ``i`` depends on nothing but the knobs and ``i``, so that a shorter run is a prefix of a longer one.
    Samples that share an image are best put next to each other: it is then loaded once.
    """

    description: ClassVar[str] = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def images(self, sample: Sample) -> list[Image.Image]:
        """The sample's images. May raise where one cannot be read: the sample then becomes a record with that error."""

    def score(self, answer: str, sample: Sample) -> float:
        """How good an answer is, in [0, 1]. By default 1 for an accepted one, whatever its case and final full stop."""
        return float(normalised(answer) in {normalised(accepted) for accepted in sample.answers})

    def measures(self, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        """Figures by name that are computed of all answers together, such as F1, in the units that papers print.

        ``samples`` may be any part of the benchmark, in its order: intervals come from leaving some out.
        """
        return {}

    def title(self) -> str:
        """What tables call it, where its plugin's name would not tell."""
        return ""

    def knobs(self) -> dict[str, Any]:
        """The settings that decide the samples and their scores: all fields, unless a subclass knows better."""
        return asdict(self) if is_dataclass(self) else {}

    def fingerprint(self) -> str:
        """Whatever decides the samples besides the knobs, the files that these name, and the code that the class
        imports."""
        return ""


def normalised(answer: str) -> str:
    """An answer as it is compared: lower case, single spaces, no full stop at the end.

    >>> normalised(" Top-left.")
    'top-left'
    """
    return " ".join(answer.lower().strip().rstrip(".").split())
