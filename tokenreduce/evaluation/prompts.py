"""A benchmark's samples as prompts, whatever answers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from tokenreduce.benchmarks.benchmark import Benchmark, QuestionError, Sample
from tokenreduce.benchmarks.images import rgb

PLACE = "{question}"
"""The place of the question in a prompt template."""


@dataclass(frozen=True)
class Prompt:
    """The question about one sample, as a model gets it.

    id:     stands for the text and the images: whatever is made of them may be kept under it.
    text:   the user's words; question: the part of them that a reducer is given which reads it.
    images: loads them.
    """

    id: str
    text: str
    question: str
    images: Callable[[], list[Image.Image]]


class Prompts:
    """The samples of a benchmark, and their prompts.

    ``template`` is the user's text, with ``{question}`` in it. Raises ``ValueError`` for one without. ``image_tokens``
    are words that stand for images to the model, so that no question may hold them.
    """

    def __init__(self, benchmark: Benchmark, template: str = PLACE, image_tokens: Sequence[str] = ()) -> None:
        if PLACE not in template:
            raise ValueError(f"prompt={template!r} has no {PLACE} in it, so the model would never see the question")
        self._benchmark = benchmark
        self._template = template
        self._image_tokens = image_tokens
        self._samples: dict[int, Sample] = {}
        self._image: tuple[str, list[Image.Image]] | None = None
        self._unreadable: dict[str, Exception | None] = {}

    def samples(self, start: int, stop: int) -> list[Sample]:
        """Samples ``start`` up to ``stop`` of the benchmark."""
        for place in range(start, stop):
            if place not in self._samples:
                self._samples[place] = self._benchmark[place]
        return [self._samples[place] for place in range(start, stop)]

    def prompt(self, sample: Sample) -> Prompt:
        """Return the prompt of a sample."""
        text = self._template.replace(PLACE, sample.question)
        return Prompt(sample.id, text, sample.question, partial(self.images, sample))

    def images(self, sample: Sample) -> list[Image.Image]:
        """The sample's images in full and in RGB.

        Raises whatever the benchmark or the file raises, and ``QuestionError`` for a question that has a problem, or
        holds the token that stands for an image: the model would look for one more.
        """
        if sample.problem:
            raise QuestionError(sample.problem)
        for token in self._image_tokens:
            if token in sample.question:
                raise QuestionError(
                    f"sample {sample.id!r}: the question {sample.question!r} holds {token!r}, which stands for an "
                    "image to this model: word it otherwise"
                )
        if self._image is None or self._image[0] != sample.image_id:
            images = self._benchmark.images(sample)
            if not images:
                raise ValueError(f"the benchmark gives no image for sample {sample.id!r}")
            # Pillow opens lazily: a damaged file shows only now.
            self._image = sample.image_id, [rgb(image, f"sample {sample.id!r}") for image in images]
        return self._image[1]

    def unreadable(self, sample: Sample) -> Exception | None:
        """The reason why the sample's images cannot be loaded, if so; tried once."""
        if sample.id not in self._unreadable:
            try:
                self.images(sample)
            except Exception as error:  # a benchmark may raise anything for a damaged file
                self._unreadable[sample.id] = error.with_traceback(None)
            else:
                self._unreadable[sample.id] = None
        return self._unreadable[sample.id]

    def readable(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Those of the samples whose images can be loaded."""
        return (sample for sample in samples if self.unreadable(sample) is None)

    def score(self, answer: str, sample: Sample) -> float:
        """The benchmark's score of an answer."""
        return float(self._benchmark.score(answer, sample))

    def forget(self) -> None:
        """Drop the images that are kept in memory."""
        self._image = None
