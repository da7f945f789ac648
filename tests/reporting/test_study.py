"""A study sets side by side what can be, and its statistics are those of the records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tokenreduce.evaluation import statistics
from tokenreduce.reporting.discovery import find
from tokenreduce.reporting.findings import findings
from tokenreduce.reporting.study import Study, studies


@pytest.fixture(scope="module")
def study(sweep: Path) -> Study:
    (only,) = studies(find([sweep])[0])
    return only


def edited(sweep: Path, folder: Path, **changes: Mapping[str, object]) -> Path:
    """A copy of a sweep, with knobs of runs replaced."""
    shutil.copytree(sweep, folder)
    for run, knobs in changes.items():
        path = folder / run / "metrics.json"
        content = json.loads(path.read_text())
        content["methods"]["reducer"]["knobs"] = knobs
        path.write_text(json.dumps(content))
    return folder


def test_the_unreduced_model_stands_first_and_every_baseline_once(study: Study) -> None:
    assert study.rows[0].key == "unreduced"
    assert [row.key for row in study.rows].count("random") == 2  # one a budget, though three methods share one
    assert [(row.budget, row.label) for row in study.methods] == [
        (1, "best keep=0.5"),
        (1, "other<b> keep=0.5"),
        (1, "downsample keep=0.5"),
        (2, "best keep=0.25"),
    ]
    assert list(study.budgets.values()) == ["72 tokens, 50 %", "36 tokens, 25 %"]
    assert study.title == "tiny on scenes"


def test_changes_are_those_of_right_and_wrong(study: Study) -> None:
    lost = {row.label: row.changes for row in study.methods}
    assert lost["best keep=0.5"] == statistics.changes([index % 5 > 0 for index in range(30)], [True] * 30)
    assert lost["other<b> keep=0.5"] == statistics.changes([index % 3 > 0 for index in range(30)], [True] * 30)
    assert all(row.changes is None for row in study.rows if row.key == "random")  # the mean of several answers


def test_p_values_are_corrected_over_all_methods_of_the_table(study: Study) -> None:
    for row in study.methods:
        scores, plain = row.comparison.scores("reducer"), row.comparison.scores("unreduced")
        images = [record.image_id for record in row.comparison.answered]
        alone = statistics.difference_p_value(scores, plain, images)
        assert row.p_unreduced is not None and alone is not None
        assert alone <= row.p_unreduced <= min(1, len(study.methods) * alone) + 1e-12


def test_hard_samples_are_those_that_a_smaller_picture_gets_wrong(study: Study) -> None:
    best, other, small, cheaper = study.methods
    hard = [index for index in range(30) if index % 2 == 0]
    assert best.hard is not None and other.hard is not None and small.hard is not None
    assert best.hard.samples == other.hard.samples == len(hard)
    assert best.hard.score.value == sum(index % 5 > 0 for index in hard) / len(hard)
    assert small.hard.score.value == 0  # by definition
    assert cheaper.hard is None  # nothing was down-sampled to that budget


def test_settings_that_differ_are_in_the_name_and_amounts_are_one_series(sweep: Path, tmp_path: Path) -> None:
    (one,) = studies(
        find(
            [
                edited(
                    sweep,
                    tmp_path / "1",
                    **{"best-0": {"keep": 0.5, "layer": -2, "x": 1}, "best-1": {"keep": 0.25, "layer": -1, "x": 1}},
                )
            ]
        )[0]
    )
    assert {row.series for row in one.methods} == {"best layer=-2", "best layer=-1", "other<b>", "downsample"}
    assert "best keep=0.5 layer=-2" in [row.label for row in one.methods]
    (other,) = studies(find([edited(sweep, tmp_path / "2", **{"best-0": {"layer": 3}, "best-1": {"layer": 2}})])[0])
    assert {(row.label, row.series) for row in other.methods} >= {("best layer=3", "best"), ("best layer=2", "best")}


def test_other_limits_are_other_studies(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "runs")
    path = tmp_path / "runs" / "best-0" / "metrics.json"
    path.write_text(path.read_text().replace('"limit": null', '"limit": 10'))
    assert sorted(len(each.methods) for each in studies(find([tmp_path / "runs"])[0])) == [1, 3]


def test_findings_claim_what_the_intervals_show(study: Study) -> None:
    text = " ".join(findings(study))
    assert "At 72 tokens, 50 %: best keep=0.5 scores highest of 3" in text
    assert "of 4 settings beat as many tokens drawn at random" in text
    assert "4 of 4 settings are measurably faster to the first token" in text
