"""The committed results are those of this version's schema, and say what the READMEs say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tokenreduce.evaluation import read_result
from tokenreduce.evaluation.result import METRICS
from tokenreduce.reporting.formatting import percent

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("name", ["fopru_row", "fopru_rank"])
def test_the_first_result_is_readable_and_the_readmes_quote_it(name: str, tmp_path: Path) -> None:
    shutil.copy(EXPERIMENTS / "first_result" / f"{name}.json", tmp_path / METRICS)
    result = read_result(tmp_path)
    assert result.main.name == name
    score = percent(result.main.score)
    assert score in (EXPERIMENTS.parent / "README.md").read_text(encoding="utf-8")
    assert f"({score.split()[0]} %)" in (EXPERIMENTS / "first_result" / "README.md").read_text(encoding="utf-8")
