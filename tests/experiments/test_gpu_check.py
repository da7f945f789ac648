"""The GPU check runs from end to end, on a small model and without a GPU."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu" / "check.py"


def test_the_gpu_check_measures_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = runpy.run_path(str(SCRIPT))
    output = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--shape", "small", "--rounds", "1", "--batches", "2", "--output", str(output)]
    check["main"](arguments)
    result = json.loads(output.read_text())
    assert [row["method"] for row in result["speed"]] == check["methods"]()
    assert result["parity"]["sdpa"]["none"] == {"same_tokens": 1.0, "logits": 1.0}
    assert all(row["ideal"] <= 1 for row in result["speed"])
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in check["methods"]())
