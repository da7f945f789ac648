"""The report's command: where the page is, and what is wrong with its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenreduce import report


def test_it_prints_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def write(*given: object, **named: object) -> Path:
        asked.extend([given, named])
        return tmp_path / "index.html"

    monkeypatch.setattr(report, "write_report", write)
    assert report.main(["one", "two", "-o", "there", "--title", "T", "--sample", "a", "--sample", "b"]) == 0
    assert asked == [([Path("one"), Path("two")], Path("there")), {"title": "T", "samples": ["a", "b"]}]
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"


def test_what_cannot_be_reported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert report.main([str(tmp_path / "nowhere")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True, True]
