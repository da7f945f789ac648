"""Model inputs for a benchmark's samples, made by the processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from tokenreduce.benchmarks.benchmark import Benchmark, QuestionError, Sample
from tokenreduce.benchmarks.images import rgb

PLACE = "{question}"
"""Where a prompt template takes the question."""

CACHED_BYTES = 512 << 20
"""Inputs up to this size are kept, because several methods are asked the same questions."""


class Prompts:
    """Prepares a benchmark's samples for ``generate``: left-padded batches on the CPU.

    ``template`` is the user's text, with ``{question}`` in it. Raises ``ValueError`` for one without, and for a
    processor that has no chat template.
    """

    def __init__(self, processor: Any, benchmark: Benchmark, template: str = PLACE) -> None:
        if PLACE not in template:
            raise ValueError(f"prompt={template!r} has no {PLACE} in it, so the model would never see the question")
        self._processor = processor
        self._benchmark = benchmark
        self._template = template
        self._samples: dict[int, Sample] = {}
        self._image: tuple[str, list[Image.Image]] | None = None
        self._unreadable: dict[str, Exception | None] = {}
        self._inputs: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._room = CACHED_BYTES

    def samples(self, start: int, stop: int) -> list[Sample]:
        """Samples ``start`` up to ``stop`` of the benchmark."""
        for place in range(start, stop):
            if place not in self._samples:
                self._samples[place] = self._benchmark[place]
        return [self._samples[place] for place in range(start, stop)]

    def images(self, sample: Sample) -> list[Image.Image]:
        """The sample's images in full and in RGB.

        Raises whatever the benchmark or the file raises, and ``QuestionError`` for a question that has a problem, or
        holds the token that stands for an image: the model would look for one more.
        """
        if sample.problem:
            raise QuestionError(sample.problem)
        for name in ("image_token", "video_token", "boi_token"):
            token = str(getattr(self._processor, name, None) or "")
            if token and token in sample.question:
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
        """Why the sample's images cannot be loaded, if so; tried once."""
        if sample.id not in self._unreadable:
            try:
                self.images(sample)
            except Exception as error:  # a benchmark may raise anything for a damaged file
                self._unreadable[sample.id] = error.with_traceback(None)
            else:
                self._unreadable[sample.id] = None
        return self._unreadable[sample.id]

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """What the processor makes of these samples as one batch."""
        key = tuple(sample.id for sample in samples)
        if key in self._inputs:
            return self._inputs[key]
        inputs = self._prepare(samples)
        size = sum(tensor.nbytes for tensor in inputs.values())
        if size <= self._room:
            self._room -= size
            self._inputs[key] = inputs
        return inputs

    def forget(self) -> None:
        """Drop what is kept in memory."""
        self._inputs.clear()
        self._image = None
        self._room = CACHED_BYTES

    def answers(self, tokens: Tensor) -> list[str]:
        """New tokens as text."""
        decoded = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def score(self, answer: str, sample: Sample) -> float:
        """The benchmark's score of an answer."""
        return float(self._benchmark.score(answer, sample))

    def _prepare(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        images = [self.images(sample) for sample in samples]
        texts = self._processor.apply_chat_template(
            [self._conversation(sample, len(shown)) for sample, shown in zip(samples, images, strict=True)],
            add_generation_prompt=True,
            tokenize=False,
        )
        tokenizer = getattr(self._processor, "tokenizer", None)
        begins = getattr(tokenizer, "bos_token", None)
        inputs = self._processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="left",
            # A template may write the begin-of-text token itself; the tokenizer must not add a second one.
            add_special_tokens=not (begins and texts[0].startswith(begins)),
            return_tensors="pt",
        )
        # PaliGemma's processor makes training targets too.
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}

    def _conversation(self, sample: Sample, images: int) -> list[dict[str, Any]]:
        text = {"type": "text", "text": self._template.replace(PLACE, sample.question)}
        return [{"role": "user", "content": [*({"type": "image"} for _ in range(images)), text]}]
