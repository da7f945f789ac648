"""The table of what selecting costs is made of every method, and hides nothing that could not be measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "selection" / "measure.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's mark of the memory in use")
def test_methods_are_measured_and_rows_renewed(tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    for names in (["fopru_rank", "none"], ["none", "uniform"]):
        main(["--only", *names, "--grids", "6x6", "8x8", "--folder", str(tmp_path)])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["method"], row["tokens"], row["kept"]) for row in rows] == [
        ("fopru_rank", 36, 4),
        ("fopru_rank", 64, 7),
        ("none", 36, None),
        ("none", 64, None),
        ("uniform", 36, 4),
        ("uniform", 64, 7),
    ]
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| fopru_rank |" in text and "select among no tokens: none." in text


def test_what_was_over_the_limit_or_failed_is_stated() -> None:
    script = runpy.run_path(str(SCRIPT))
    rows = [
        {"method": "slow", "tokens": 100, "kept": 10, "milliseconds": 20.0, "peak_bytes": 2**20},
        {"method": "slow", "tokens": 1000, "kept": 100, "milliseconds": 2000.0, "peak_bytes": 2**22},
        {"method": "slow", "tokens": 9000, "over_limit_seconds": 60},
        {"method": "wrong", "tokens": 100, "error": "ValueError: no"},
    ]
    text = script["table"](rows)
    assert "| slow | 20 | 2,000 | over 60 s | 2.0 | 1 | 4 | - |" in text
    assert "- wrong at 100 tokens: ValueError: no" in text
