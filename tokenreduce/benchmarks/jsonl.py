"""Images and questions of one's own: a JSON-lines file beside a folder of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tokenreduce.benchmarks.tabular import Row, TabularBenchmark
from tokenreduce.fingerprint import file_digest

_SHOWN = 80
"""Characters of a bad line that a message repeats."""


@dataclass(frozen=True, kw_only=True)
class JsonLines(TabularBenchmark):
    """A question a line, ``{"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}``, beside its images.

    path: the file, or a folder with a single ``.jsonl`` file in it.
    images_folder: where the images are that lines name, as seen from the file.
    id_column: the column that names a sample; under the name "id" lines may do without it, and are known by their
        number then.
    category_column: the column of the group that a sample is reported in; under the name "category" lines may do
        without it.
    image_id_column: the column that names a sample's image; without one, it is the file's name.
    """

    description: ClassVar[str] = "your own images and questions: a JSON-lines file beside a folder of images"

    path: str
    images_folder: str = "images"
    id_column: str | None = "id"
    category_column: str | None = "category"

    def title(self) -> str:
        return Path(self.path).resolve().stem

    def knobs(self) -> dict[str, Any]:
        """All but the place, which does not change what is in it."""
        return {name: value for name, value in super().knobs().items() if name != "path"}

    def fingerprint(self) -> str:
        """Digest of the file as it was read, and of its images' names and present contents."""
        digest = hashlib.blake2b(self._content, digest_size=16)
        for name in sorted({name for row in self._rows for name in self._names(row)}):
            image = self._folder / name
            digest.update(f"{name}\n{file_digest(image) if image.is_file() else 'missing'}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _content(self) -> bytes:
        return self._file.read_bytes()

    @cached_property
    def _file(self) -> Path:
        path = Path(self.path).expanduser()
        if path.is_file():
            return path
        if not path.is_dir():
            raise ValueError(f"benchmark.path={self.path!r}: there is no such file or folder")
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise ValueError(
                f"benchmark.path={self.path!r} has to hold one .jsonl file and holds {found}: name the file"
            )
        return files[0]

    @property
    def _folder(self) -> Path:
        return self._file.parent / self.images_folder

    def _load(self) -> Sequence[Row]:
        try:
            text = self._content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file} is no UTF-8 text: {error}") from error
        rows = [self._parsed(line, number) for number, line in enumerate(text.rstrip().split("\n")) if text.strip()]
        # All at once: a mistake in the last line shows before anything is run.
        samples = [self._sample(row, number) for number, row in enumerate(rows)]
        if samples:
            self._check_for_numbers(answer for sample in samples for answer in sample.answers)
        return rows

    def _parsed(self, line: str, number: int) -> Row:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._place(number)} is not JSON ({error}): {line[:_SHOWN]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{self._place(number)} is no object like {{"image": …}}: {line[:_SHOWN]!r}')
        names = self._cell(row, self.image_column, number)
        if not names or not all(isinstance(name, str) for name in (names if isinstance(names, list) else [names])):
            raise ValueError(f"{self._place(number)}: {names!r} is neither an image's file name nor a list of them")
        return row

    def _cell(self, row: Row, column: str, number: int) -> Any:
        if column not in row and column in ("id", "category"):
            return number + 1 if column == "id" else "all"
        return super()._cell(row, column, number)

    def _names(self, row: Row) -> list[str]:
        names = row[self.image_column]
        return names if isinstance(names, list) else [names]

    def _image_key(self, row: Row, number: int) -> str:
        return " ".join(self._names(row))

    def _open(self, row: Row) -> list[Image.Image]:
        return [Image.open(self._folder / name) for name in self._names(row)]

    def _place(self, number: int | None = None) -> str:
        return str(self._file) if number is None else f"{self._file}, line {number + 1},"
