"""A record file loses nothing that was written and shows nothing that was not."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from tokenreduce.attach import ImageReduction, StepReduction
from tokenreduce.evaluation.records import (
    RECORDS,
    Record,
    RecordFile,
    StorageError,
    read_records,
    write_atomically,
)
from tokenreduce.reducer import Grid


def record(number: int) -> Record:
    step = StepReduction("projector", (0, 3), (0, -1, -1, 1), merged=bool(number % 2))
    return Record(
        id=f"sample-{number}",
        image_id=f"image-{number // 2}",
        category="reading",
        question="Which digit is rød?",
        expected=("7", "seven"),
        answer='a "quoted"\nanswer\u2028',
        score=number / 10,
        visual_tokens=4,
        entering=2,
        lengths=(9, 9),
        images=(ImageReduction(Grid(2, 2), (step,), 5), ImageReduction(Grid(1, 2), role="frame", picture=1, time=0.5)),
        layer_mean=2.0,
        vision_flops=1e9,
        llm_flops=2e9,
        kv_bytes=512,
        seconds=0.25,
    )


RECORDED = [record(number) for number in range(6)]


def altered(**fields: Any) -> str:
    """The line of a record with other values in some fields."""
    return json.dumps(json.loads(record(0).line()) | fields)


def write(folder: Path, records: list[Record]) -> Path:
    with RecordFile(folder) as file:
        file.append(records)
    return folder / RECORDS


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    failed = Record("x", "y", "z", "?", ("no",), error="OSError: gone")
    path = write(tmp_path, [*RECORDED, failed])
    assert read_records(tmp_path) == [*RECORDED, failed]
    assert read_records(tmp_path, limit=2) == RECORDED[:2]
    assert len(path.read_text(encoding="utf-8").split("\n")) == 8, "one line a record, whatever is in an answer"


def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path: Path) -> None:
    content = write(tmp_path, RECORDED).read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    moments = random.Random(0).sample(range(len(content)), 40) + ends + [end - 1 for end in ends]
    for moment in moments:
        (tmp_path / RECORDS).write_bytes(content[:moment])
        whole = sum(end <= moment for end in ends)
        assert read_records(tmp_path) == RECORDED[:whole]
        assert write(tmp_path, RECORDED).read_bytes() == content


def test_a_sample_is_recorded_once(tmp_path: Path) -> None:
    with RecordFile(tmp_path) as file:
        assert file.append(RECORDED[:3]) == RECORDED[:3]
        assert file.append(RECORDED) == RECORDED[3:]
    with RecordFile(tmp_path) as file:
        assert file.append(RECORDED) == []
    assert read_records(tmp_path) == RECORDED


def test_an_empty_folder_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []


def test_an_older_schema_is_refused_with_the_way_to_a_new_one(tmp_path: Path) -> None:
    step = {"site": "projector", "index": [0], "source": [0, -1], "merged": False}
    older = {"schema": 1, "id": "a", "images": [{"grid": [1, 1, 2], "steps": [step], "part": False}]}
    (tmp_path / RECORDS).write_text(json.dumps(older) + "\n", encoding="utf-8")
    with pytest.raises(
        StorageError, match=r"records.jsonl, line 1: schema 1 of an older .* reads schema 2: run the same command again"
    ):
        read_records(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, RECORDED[:2])
    newer = json.loads(RECORDED[2].line()) | {"schema": 99, "mood": "good"}
    path.write_text(path.read_text(encoding="utf-8") + json.dumps(newer) + "\n", encoding="utf-8")
    with pytest.raises(StorageError, match=r"records.jsonl, line 3: .*schema 99.*use the version that wrote it"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "Expecting value"),
        ("[]", "its schema is missing"),
        ("{}", "its schema is missing"),
        ('{"schema": 2}', "category is missing"),
        (altered(id=3), "id is 3 and no str"),
        (altered(mood="good"), "mood is unknown"),
        (altered(lengths=[9, "9"]), r"lengths\[1\] is '9' and no int"),
        (altered(images=[{"grid": {"height": 2}}]), r"images\[0\].grid.width is missing"),
        (altered(images=[{"grid": {"height": 2, "width": 2}, "role": "hole"}]), r"images\[0\].role is 'hole' and no"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path, RECORDED[:1])
    path.write_text(path.read_text(encoding="utf-8") + line + "\n" + RECORDED[1].line(), encoding="utf-8")
    with pytest.raises(StorageError, match=rf"records.jsonl, line 2: {reason}.*; delete it to start again"):
        read_records(tmp_path)


def test_a_full_disk_is_named_and_costs_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenreduce.evaluation import records

    class AlmostFull(FileIO):
        room = 3000

        def write(self, data: Any) -> int:
            if not AlmostFull.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            part = bytes(data)[: AlmostFull.room]
            AlmostFull.room -= len(part)
            return super().write(part)

    monkeypatch.setattr(records, "FileIO", AlmostFull)
    with pytest.raises(StorageError, match=r"cannot write .*records.jsonl: No space left on device") as caught:
        write(tmp_path, RECORDED * 1 + [record(number) for number in range(6, 30)])
    assert "kept" in str(caught.value)
    content = (tmp_path / RECORDS).read_text(encoding="utf-8")
    kept = read_records(tmp_path)
    assert 2 < len(kept) < 30 and content.endswith("\n") and len(content) < 3000
    AlmostFull.room = 10**9
    write(tmp_path, RECORDED + [record(number) for number in range(6, 30)])
    assert len(read_records(tmp_path)) == 30


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_atomically(path, "old")
    (tmp_path / f".metrics.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*metrics.json: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="the superuser may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StorageError, match=r"cannot write .*Permission denied"):
        write(tmp_path, RECORDED)


def test_appending_needs_an_open_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context manager"):
        RecordFile(tmp_path).append(RECORDED)
