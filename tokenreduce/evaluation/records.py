"""Records: what a run found out about each sample, one JSON line each, in a file that survives being killed.

A record is written in one go and flushed to the operating system. A line that was cut short (a kill, a full disk) is
discarded when the file is opened again, so that whatever a reader sees is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

from tokenreduce.attach import ImageReduction
from tokenreduce.evaluation.schema import SchemaError, from_json, to_json

SCHEMA = 2
"""The version of a line's layout; a reader refuses others."""

RECORDS = "records.jsonl"
PARTS = "records.part-*.jsonl"
"""Records of one of several processes that :func:`merge` has not put into the one file yet."""


class StorageError(OSError):
    """Results cannot be written or read; the message names the path and the remedy."""


@dataclass(frozen=True)
class Record:
    """One sample of one run. ``error`` says why there is no answer; all that depends on one is then None or empty.

    id, image_id, category, question: the sample's own; expected: its accepted answers.
    score:         in [0, 1].
    images:        what was done to each image, tile of one, or frame.
    visual_tokens: how many the sample has; entering: how many entered the language model.
    lengths:       the prompt's length, text included, at the input of every decoder layer.
    layer_mean:    visual tokens averaged over decoder layer inputs.
    vision_flops, llm_flops: of the prefill; kv_bytes: of the cache after it.
    seconds:       the sample's share of its batch's time. For orientation: times are compared by the clock, not by
    these.
    """

    id: str
    image_id: str
    category: str
    question: str
    expected: tuple[str, ...]
    answer: str | None = None
    score: float | None = None
    visual_tokens: int | None = None
    entering: int | None = None
    lengths: tuple[int, ...] = ()
    images: tuple[ImageReduction, ...] = ()
    layer_mean: float | None = None
    vision_flops: float | None = None
    llm_flops: float | None = None
    kv_bytes: float | None = None
    seconds: float | None = None
    error: str | None = None

    def line(self) -> str:
        """This record as one line of JSON."""
        return to_json(self, SCHEMA) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Record:
        """The inverse of :meth:`line`; raises as :func:`tokenreduce.evaluation.schema.from_json` does."""
        return from_json(cls, line, SCHEMA)


def read_records(folder: Path | str, limit: int | None = None) -> list[Record]:
    """The records of a run's folder in the benchmark's order, at most the first ``limit``.

    A torn last line is left out. Raises ``StorageError`` for a file that is no records file, or another version's.
    """
    return list(_load(Path(folder) / RECORDS)[0].values())[:limit]


def _load(path: Path) -> tuple[dict[str, Record], int]:
    """Records by sample id, and how many bytes of the file hold whole lines."""
    with storage(path, "read"):
        content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    records: dict[str, Record] = {}
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            record = Record.from_line(line.decode())
        except ValueError as error:
            remedy = "" if isinstance(error, SchemaError) else "; delete it to start again"
            raise StorageError(f"{path}, line {number}: {error}{remedy}") from error
        records.setdefault(record.id, record)
    return records, end


class RecordFile:
    """The records of one run, open for appending. Use it as a context manager, under the folder's lock.

    ``part`` is the place among several processes that write at the same time, each to a file of its own.
    """

    def __init__(self, folder: Path, part: int | None = None) -> None:
        self._folder = folder
        self.path = folder / (RECORDS if part is None else PARTS.replace("*", str(part)))
        self.records: dict[str, Record] = {}
        self._end = 0
        self._file: FileIO | None = None

    def __enter__(self) -> RecordFile:
        self.records, self._end = _load(self.path)
        if self.path.name != RECORDS:
            self.records = _load(self._folder / RECORDS)[0] | self.records
        with storage(self.path):
            # Unbuffered, so that an interrupted write leaves nothing behind that would be written later.
            self._file = FileIO(self.path, "a")
            self._file.truncate(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, records: Iterable[Record]) -> list[Record]:
        """Write and return those whose sample is not in the file yet. Raises ``StorageError`` if the disk refuses."""
        if self._file is None:
            raise ValueError(f"{self.path} is not open: use the record file as a context manager")
        new: list[Record] = []
        for record in records:
            if record.id in self.records:
                continue
            line = record.line().encode()
            with storage(self.path):
                try:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[self._file.write(rest) :]
                except BaseException:
                    with suppress(OSError):
                        self._file.truncate(self._end)
                    raise
            self._end += len(line)
            self.records[record.id] = record
            new.append(record)
        return new


@contextmanager
def storage(path: Path, verb: str = "write") -> Iterator[None]:
    """Turns an ``OSError`` of the body into a ``StorageError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        remedy = "what was written before is kept: free some space or choose another output folder, and start again"
        raise StorageError(f"cannot {verb} {path}: {error.strerror or error}; {remedy}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file, or leave the one that stands there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with storage(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def merge(folder: Path, ids: Sequence[str]) -> None:
    """Put the records of all processes into one file, in the benchmark's order; under the folder's lock.

    Killed at any moment and called again, it ends the same: parts are deleted when their records stand elsewhere.
    """
    parts = sorted(folder.glob(PARTS))
    found = _load(folder / RECORDS)[0]
    merged = dict(found)
    for part in parts:
        merged = _load(part)[0] | merged
    ordered = {record.id: record for record in in_order(merged, ids)} | merged  # others come after: a limit was lowered
    if list(ordered) != list(found):
        write_atomically(folder / RECORDS, "".join(record.line() for record in ordered.values()))
    for part in parts:
        with storage(part):
            part.unlink()


def in_order(records: dict[str, Record], ids: Sequence[str]) -> list[Record]:
    """The records of these samples, in this order."""
    return [records[each] for each in ids if each in records]
