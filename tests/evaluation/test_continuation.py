"""Whatever ends a run (kill -9 in mid-line, Ctrl-C, a full disk), the next one makes it the same as a calm run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened in worker.py."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worker.py")), str(tmp_path_factory.mktemp("runs"))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("scenario", ["killed", "interrupted", "doubled", "shared", "bereft", "full"])
def test_the_records_are_those_of_a_calm_run(found: dict[str, Any], scenario: str) -> None:
    assert found[scenario]["records"] == found["calm"]["records"]
    assert found[scenario]["written"] == found["calm"]["written"] == 24


def test_the_calm_run_has_answers_scores_and_errors(found: dict[str, Any]) -> None:
    records = found["calm"]["records"]
    assert len({record["answer"] for record in records}) > 5 and len({record["score"] for record in records}) > 2
    assert [record["id"] for record in records if record["error"]] == ["card-15", "card-16", "card-17"]


def test_runs_were_killed_and_lines_torn(found: dict[str, Any]) -> None:
    assert found["killed"]["deaths"] >= 15, (
        "those that die by what they wrote; the clock may come too late for the others"
    )
    assert found["killed"]["torn"] >= 10 and found["killed"]["end"] == 0


def test_an_interrupt_leaves_whole_lines(found: dict[str, Any]) -> None:
    assert found["interrupted"]["code"] == 130 and found["interrupted"]["whole"] and found["interrupted"]["lines"] == 8


def test_a_second_job_waits_and_does_nothing_twice(found: dict[str, Any]) -> None:
    assert found["doubled"]["answered"] == [0, 24] and found["doubled"]["waited"] == [True, False]


def test_processes_that_share_a_run_end_when_one_dies_and_leave_nothing_to_put_together(found: dict[str, Any]) -> None:
    first, second, last = found["shared"]["ends"]
    assert first[1] == second[0] == -9 and first[0] not in (0, -9) and second[1] not in (0, -9) and last == [0, 0]
    assert found["shared"]["left"] == found["bereft"]["left"] == 0
    assert found["bereft"]["parts"] == 2, "there was something to put together"


def test_a_sweep_that_is_killed_again_and_again_ends_as_a_calm_one(found: dict[str, Any]) -> None:
    swept = found["swept"]
    assert swept["deaths"] >= 8 and swept["end"] == 0
    assert swept["same"] and swept["lines"] == 12 * swept["runs"], "no record lost or doubled, and the same metrics"


def test_a_full_disk_is_a_clear_error(found: dict[str, Any]) -> None:
    assert found["full"]["code"] == 7 and 0 < found["full"]["kept"] < 24
    assert "records.jsonl" in found["full"]["message"] and "free some space" in found["full"]["message"]
