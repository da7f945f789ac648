"""Benchmarks whose questions are the rows of a table: what those of a folder and those of a hub have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from tokenreduce.benchmarks.benchmark import Benchmark, Sample, normalised
from tokenreduce.benchmarks.images import rgb
from tokenreduce.benchmarks.scoring import LETTERS, is_number, metric_named
from tokenreduce.knobs import check_knobs, nearest

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TabularBenchmark(Benchmark):
    """Questions in the rows of a table.

    metric: how answers are scored: exact, vqa, anls, relaxed, yes_no, mme, choice or mmbench.
    image_column: the column of a row's image, or of a list of them.
    question_column: the column of the question.
    answer_column: the column of the accepted answer, or of a list of them.
    id_column: the column that names a sample; without one, samples are known by their row number.
    image_id_column: the column that names a sample's image; without one, images are known by their content.
    category_column: the column of the group that a sample is reported in.
    choice_columns: for multiple choice, the column that holds a list of choices, or a column for each choice. They are
        written below the question, and the answer column holds the right one's letter, its place from 0, or its words.
    hint_column: the column of a text that is written above the question, where a row has one.
    hint_prefix: what goes before such a text.
    remove: a phrase that is taken out of every question.
    shuffle: a seed to take the rows in random order; a shorter run is a prefix of a longer one in this order too.
    """

    metric: str = "exact"
    image_column: str = "image"
    question_column: str = "question"
    answer_column: str = "answer"
    id_column: str | None = None
    image_id_column: str | None = None
    category_column: str | None = None
    choice_columns: tuple[str, ...] = ()
    hint_column: str | None = None
    hint_prefix: str = ""
    remove: str = ""
    shuffle: int | None = None

    def __post_init__(self) -> None:
        check_knobs(self)
        if metric_named(self.metric).choices and not self.choice_columns:
            raise ValueError(
                f"metric={self.metric!r} scores the letters of choices, and there are none: name the columns that hold "
                "them with choice_columns, or take another metric"
            )
        if self.shuffle is not None and self.shuffle < 0:
            raise ValueError(f"shuffle={self.shuffle} is negative; it is a seed, or null for the rows as they come")

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: where it is sent to, rows are read again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def _load(self) -> Sequence[Row]:
        """The rows; read when they are first needed."""

    @abstractmethod
    def _open(self, row: Row) -> list[Image.Image]:
        """The images of a row, as files have them."""

    @abstractmethod
    def _image_key(self, row: Row, number: int) -> str:
        """What tells a row's images from other rows', where no column does."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = index if self.shuffle is None else int(self._order[index])
        if number not in self._samples:
            sample = self._sample(self._text(number), number)
            self._samples[number] = sample
            self._numbers[sample.id] = number
        return self._samples[number]

    def images(self, sample: Sample) -> list[Image.Image]:
        """The sample's images in RGB; see :func:`tokenreduce.benchmarks.images.rgb`."""
        number = self._number(sample)
        images = []
        for image in self._open(self._rows[number]):
            with image:
                images.append(rgb(image, self._place(number)))
        return images

    def score(self, answer: str, sample: Sample) -> float:
        return metric_named(self.metric).score(answer, sample.answers)

    def measures(self, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
        measures = metric_named(self.metric).measures
        return measures(answers, samples) if measures else {}

    @cached_property
    def _rows(self) -> Sequence[Row]:
        return self._load()

    @cached_property
    def _order(self) -> np.ndarray[Any, Any]:
        return np.random.default_rng(self.shuffle).permutation(len(self))

    @cached_property
    def _samples(self) -> dict[int, Sample]:
        """The samples that were made so far, by row number."""
        return {}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Row numbers of the samples that were made so far."""
        return {}

    def _number(self, sample: Sample) -> int:
        if sample.id not in self._numbers:  # made by another process, whose records are read
            for number in range(len(self)):
                if self._id(self._text(number), number) == sample.id:
                    self._numbers[sample.id] = number
                    break
            else:
                raise ValueError(f"there is no sample {sample.id!r} in {self._place()}")
        return self._numbers[sample.id]

    def _text(self, number: int) -> Row:
        """A row, which need not hold the images unless they are what it is known by."""
        return self._rows[number]

    def _place(self, number: int | None = None) -> str:
        """Where the rows are, or one of them, for messages."""
        return "the table" if number is None else f"row {number} of {self._place()}"

    def _id(self, row: Row, number: int) -> str:
        return str(number) if self.id_column is None else str(self._cell(row, self.id_column, number))

    def _sample(self, row: Row, number: int) -> Sample:
        question = self._cell(row, self.question_column, number)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{self._place(number)}: the question {question!r} is no text")
        if self.remove:
            question = question.replace(self.remove, "")
        lines = [question.strip()]
        if self.hint_column and _present(hint := self._cell(row, self.hint_column, number)):
            lines.insert(0, f"{self.hint_prefix}{hint}")
        accepted = self._cell(row, self.answer_column, number)
        if self.choice_columns:
            choices = self._choices(row, number)
            lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
            answers = self._right_choice(accepted, choices, number)
        else:
            answers = self._answers(accepted, number)
        category = "all" if self.category_column is None else str(self._cell(row, self.category_column, number))
        column = self.image_id_column
        image_id = self._image_key(row, number) if column is None else str(self._cell(row, column, number))
        question, problem = "\n".join(lines), ""
        if (written := _written(question)) != question:
            problem = f"{self._place(number)}: the question {written!r} holds half a character, which is no text"
        sample = Sample(self._id(row, number), written, answers, category, image_id, problem)
        self._check(sample, number)
        return sample

    def _check(self, sample: Sample, number: int) -> None:
        """Raise ``ValueError`` for a sample that cannot be kept in a record, or not be scored by the metric."""
        for text in (sample.id, *sample.answers, sample.category, sample.image_id):
            if _written(text) != text:
                raise ValueError(f"{self._place(number)}: {_written(text)!r} holds half a character, which is no text")
        metric = metric_named(self.metric)
        if len(sample.answers) < metric.fewest:
            raise ValueError(
                f"{self._place(number)} has {len(sample.answers)} answers; metric {self.metric!r} is made for ten "
                f"people's and takes no fewer than {metric.fewest}: with benchmark.metric=exact, any one is right"
            )
        if reason := metric.refusal(sample):
            raise ValueError(
                f"{self._place(number)}: metric {self.metric!r} cannot score sample {sample.id!r}: {reason}"
            )

    def _check_for_numbers(self, answers: Iterable[object]) -> None:
        """Raise ``ValueError`` where the metric is for numbers and none of the benchmark's answers is one."""
        if metric_named(self.metric).numbers and not any(is_number(str(answer)) for answer in answers):
            raise ValueError(
                f"{self._place(0)} and all others have answers that are no numbers, which metric {self.metric!r} is "
                "for: take benchmark.metric=exact"
            )

    def _cell(self, row: Row, column: str, number: int) -> Any:
        if column not in row:
            knob = next((field.name for field in fields(self) if getattr(self, field.name) == column), "choice_columns")
            known = [str(name) for name in row]
            raise ValueError(
                f"{self._place(number)} has no column {column!r}: {nearest(column, known)} "
                f"(its columns are {', '.join(known)}; choose with benchmark.{knob}=NAME)"
            )
        return row[column]

    def _answers(self, value: Any, number: int) -> tuple[str, ...]:
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for each in values:
            if isinstance(each, bool) or not isinstance(each, str | int | float):
                raise ValueError(f"{self._place(number)}: the answer {each!r} is neither text nor a number")
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{self._place(number)}: the answer {each!r} is no number that there is")
        if not any(str(each).strip() for each in values):
            raise ValueError(
                f"{self._place(number)} has no answer, only {value!r}; some data sets hide those of a split"
            )
        return tuple(str(each) for each in values)

    def _choices(self, row: Row, number: int) -> list[str]:
        cells = [self._cell(row, column, number) for column in self.choice_columns]
        values: Iterable[Any] = cells[0] if len(cells) == 1 and isinstance(cells[0], list | tuple) else cells
        choices = [str(value) for value in values if _present(value)]
        if not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{self._place(number)} has {len(choices)} choices; it takes 2 to {len(LETTERS)}")
        return choices

    def _right_choice(self, value: Any, choices: Sequence[str], number: int) -> tuple[str, ...]:
        letters = LETTERS[: len(choices)]
        words = [normalised(choice) for choice in choices]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
            place = value
        elif isinstance(value, str) and value.strip() in tuple(letters):
            place = letters.index(value.strip())
        elif isinstance(value, str) and normalised(value) in words:
            place = words.index(normalised(value))
        else:
            raise ValueError(
                f"{self._place(number)}: the answer {value!r} is no choice; it is one of {', '.join(letters)}, "
                f"a place from 0 to {len(choices) - 1}, or the words of one of {list(choices)}"
            )
        return letters[place], choices[place]


def _written(text: str) -> str:
    """A text with what cannot be written to a file spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _present(value: Any) -> bool:
    """Whether a cell holds something; tables that went through pandas say "nan" where they do not."""
    return value is not None and str(value).strip().lower() not in ("", "nan", "none")
