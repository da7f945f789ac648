"""Runs are found wherever they are, and what cannot be used is told, not raised."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tokenreduce.reporting.discovery import find


def names(places: list[Path | str]) -> list[str]:
    return sorted(each.folder.name for each in find(places)[0])


def test_a_folder_of_runs_and_the_runs_themselves_are_the_same(sweep: Path) -> None:
    expected = ["best-0", "best-1", "down-3", "othe-2"]
    assert names([sweep]) == expected
    assert names(sorted(sweep.iterdir())) == expected
    assert names([sweep.parent]) == expected
    assert names([sweep / "best-0" / "metrics.json", sweep / "best-0"]) == ["best-0"]


def test_broken_and_unfinished_runs_are_told(sweep: Path) -> None:
    reasons = {each.folder.name: each.reason for each in find([sweep])[1]}
    assert reasons.keys() == {"broken", "unfinished"}
    assert "metrics.json cannot be used" in reasons["broken"]
    assert "not finished" in reasons["unfinished"]


def test_nothing_to_report_is_an_error_that_says_what_was_there(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find([tmp_path / "outputs"])
    with pytest.raises(ValueError, match="no finished comparison in"):
        find([tmp_path])
    with pytest.raises(ValueError, match=r"broken: its metrics.json cannot be used"):
        find([sweep / "broken"])


@pytest.mark.parametrize("lost", ["schema", "run", "methods", "benchmark", "settings"])
def test_metrics_that_lack_something_are_left_out(lost: str, sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "runs")
    path = tmp_path / "runs" / "best-0" / "metrics.json"
    content = json.loads(path.read_text())
    del content[lost]
    path.write_text(json.dumps(content))
    found, skipped = find([tmp_path / "runs"])
    assert len(found) == 3
    assert "best-0" in [each.folder.name for each in skipped]


def test_without_records_there_are_still_the_metrics(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "best-0", tmp_path / "best-0")
    (comparison,), (skipped,) = find([tmp_path])
    assert not comparison.answered
    assert "without what needs records" in skipped.reason


def test_of_the_same_run_the_newer_one_counts(sweep: Path, tmp_path: Path) -> None:
    for place in ("old", "new"):
        shutil.copytree(sweep, tmp_path / place)
    os.utime(tmp_path / "old" / "best-0" / "metrics.json", (0, 0))
    found, skipped = find([tmp_path / "new" / "best-0", tmp_path / "old" / "best-0"])
    assert [each.folder.parent.name for each in found] == ["new"]
    assert any("and newer" in each.reason for each in skipped)


def test_which_tokens_were_kept_is_read_for_chosen_samples_alone(sweep: Path) -> None:
    found, _ = find([sweep / "best-0"], lambda records: [record.id for record in records][:2])
    (run,) = found[0].records["reducer"]
    assert [bool(record.images) for record in run.values()] == [True, True] + [False] * (len(run) - 2)
