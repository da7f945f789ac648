"""Question-answering data sets of the Hugging Face hub, or in its layout on disk, through the ``datasets`` library."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tokenreduce.benchmarks.tabular import Row, TabularBenchmark
from tokenreduce.fingerprint import digest, file_digest
from tokenreduce.knobs import nearest


@dataclass(frozen=True, kw_only=True)
class HubDataset(TabularBenchmark):
    """A data set with a question and its image in every row.

    path: its name on the hub, such as ``lmms-lab/POPE``, or a folder in the hub's layout.
    subset: which of the data set's configurations, where it has several.
    split: such as ``test`` or ``validation``.
    revision: a branch, tag or commit of the hub.
    images_subset: the configuration that holds the images, by ``id``, where they stand apart from the questions; these
        name them in ``image_id_column``.
    streaming: fetch only the samples that are asked for, and keep them in memory: for a small ``limit``.
    """

    description: ClassVar[str] = "a data set of the Hugging Face hub, or in its layout on disk"

    path: str
    subset: str | None = None
    split: str = "test"
    revision: str | None = None
    images_subset: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.shuffle is not None:
            raise ValueError(f"shuffle={self.shuffle} needs the whole split, streaming=true fetches its beginning only")
        if self.images_subset and not self.image_id_column:
            raise ValueError(f"images_subset={self.images_subset!r} needs image_id_column, which names a row's image")

    def title(self) -> str:
        return f"{Path(self.path).name} {self.split}"

    def knobs(self) -> dict[str, Any]:
        """All but how rows are fetched, and where a local folder is."""
        left_out = {"streaming", *(["path"] if self._local else [])}
        return {name: value for name, value in super().knobs().items() if name not in left_out}

    def fingerprint(self) -> str:
        """The hub's commit, or a digest of a local folder's data files and of the images that these name."""
        if not self._local:
            return " ".join(str(builder.hash) for builder in self._builders)
        files = [Path(file) for builder in self._builders for file in sorted(self._files(builder))]
        named = [path for path in map(Path, self._named_images) if path.is_file()]
        return digest(file_digest(file).encode() for file in [*files, *named])

    @cached_property
    def _named_images(self) -> list[str]:
        """The names of image files in a column of text; images of other columns are part of the data files."""
        rows = self._builders[-1].as_streaming_dataset(self.split)
        if rows.features is not None and "string" not in str(rows.features.get(self.image_column)):
            return []
        values = (row.get(self.image_column) for row in rows)
        return sorted({name for value in values for name in _listed(value) if isinstance(name, str)})

    @property
    def _local(self) -> bool:
        return Path(self.path).is_dir()

    @cached_property
    def _builders(self) -> list[Any]:
        """The library's objects for the questions and, where they stand apart, the images."""
        subsets = [self.subset, *([self.images_subset] if self.images_subset else [])]
        return [self._builder_of(self.path, name=subset, revision=self.revision) for subset in subsets]

    def _builder_of(self, path: str, **options: Any) -> Any:
        try:
            import datasets  # here: it is an optional dependency, and slow to import
        except ImportError as error:
            raise ValueError("data sets of the hub need a library: pip install 'tokenreduce[datasets]'") from error
        return datasets.load_dataset_builder(path, **options)

    def _load(self) -> Sequence[Row]:
        rows: Any
        builder = self._builders[0]
        if self.streaming:
            self._files(builder)  # raises where there is no such split
            recorded = (builder.info.splits or {}).get(self.split)
            rows = builder.as_streaming_dataset(self.split).decode(False)
            return _Stream(iter(rows), recorded.num_examples if recorded else None)
        rows = self._downloaded(builder)
        if len(rows) and self.answer_column in rows.features and not self.choice_columns:
            self._check_for_numbers(answer for value in rows[self.answer_column] for answer in _listed(value))
        return rows

    def _downloaded(self, builder: Any) -> Any:
        """The rows on disk. Where they are not there yet, this split's files alone are fetched, if that can be done."""
        files = self._files(builder)
        if files and builder.info.builder_name == "parquet" and not Path(builder.cache_dir).exists():
            features = builder.info.features
            builder = self._builder_of("parquet", data_files={self.split: files}, features=features)
        builder.download_and_prepare()
        return _undecoded(builder.as_dataset(self.split), self.image_column)

    def _files(self, builder: Any) -> list[str]:
        """Where the split's files are; none are known of what comes out of a cache without a network."""
        files = {str(split): found for split, found in (builder.config.data_files or {}).items()}
        if files and self.split not in files:
            raise ValueError(f"{self.path} has no split {self.split!r}: {nearest(self.split, list(files))}")
        return [str(file) for file in files.get(self.split, [])]

    @cached_property
    def _texts(self) -> Any:
        """The rows without their images, where these are not needed to tell samples from one another."""
        rows: Any = self._rows
        whole = self.image_id_column is None or isinstance(rows, _Stream) or self.image_column not in rows.features
        return rows if whole else rows.remove_columns(self.image_column)

    @cached_property
    def _apart(self) -> tuple[Any, dict[str, int]]:
        """The images that stand apart from the questions, and their row numbers by id."""
        rows = self._downloaded(self._builders[1])
        return rows, {str(each): number for number, each in enumerate(rows["id"])}

    def _text(self, number: int) -> Row:
        row: Row = self._texts[number]
        return row

    def _open(self, row: Row) -> list[Image.Image]:
        if self.images_subset and self.image_id_column:
            rows, numbers = self._apart
            wanted = str(row[self.image_id_column])
            if wanted not in numbers:
                raise ValueError(f"{self.images_subset} of {self.path} has no image {wanted!r}")
            row = rows[numbers[wanted]]
        return [_opened(value) for value in _listed(row[self.image_column])]

    def _image_key(self, row: Row, number: int) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for value in _listed(self._cell(row, self.image_column, number)):
            content = _content(value)
            digest.update(content.encode() if isinstance(content, str) else content)
        return digest.hexdigest()

    def _place(self, number: int | None = None) -> str:
        place = " ".join(filter(None, (self.path, self.subset, self.split)))
        return place if number is None else f"row {number} of {place}"


class _Stream(Sequence[Row]):
    """Rows that are read from an iterator up to the last one that was asked for; ``length`` is None if unknown."""

    def __init__(self, rows: Iterator[Row], length: int | None) -> None:
        self._rest, self._length = rows, length
        self._read: list[Row] = []

    def __len__(self) -> int:
        if self._length is None:
            self._read.extend(self._rest)
            self._length = len(self._read)
        return self._length

    def __getitem__(self, index: Any) -> Any:
        self._read.extend(islice(self._rest, max(0, index + 1 - len(self._read))))
        return self._read[index]


def _undecoded(rows: Any, column: str) -> Any:
    """The rows with images as files' contents: a damaged one shows when it is opened, and not before."""
    import datasets

    feature = rows.features.get(column)
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
        return rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _content(value: Any) -> bytes | str:
    """An image's file, or where it is, out of a cell that holds the one, the other, or a pair of which one is None."""
    content = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if isinstance(content, bytes | str):
        return content
    raise ValueError(f"a cell of the image column holds {type(value).__name__} and no image")


def _opened(value: Any) -> Image.Image:
    content = _content(value)
    return Image.open(content if isinstance(content, str) else io.BytesIO(content))
