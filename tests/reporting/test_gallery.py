"""What was kept is laid over the picture, token by token; a picture that is gone leaves the choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tokenreduce.benchmarks.scenes import Scenes
from tokenreduce.reporting.discovery import find
from tokenreduce.reporting.gallery import first_samples, gallery
from tokenreduce.reporting.study import Study, studies

from .made_up import SIDE, dropping, record


def study_of(folder: Path) -> Study:
    return studies(find([folder], lambda records: first_samples(records, 2))[0])[0]


def test_every_method_is_drawn_over_the_same_picture(sweep: Path) -> None:
    study = study_of(sweep)
    drawn = gallery(study, first_samples(study.unreduced.comparison.answered, 2))
    assert len(drawn) == 2
    assert all(each.picture is not None and each.picture.startswith("data:image/jpeg;base64,") for each in drawn)
    assert {budget: len(kept) for budget, kept in drawn[0].budgets.items()} == {1: 4, 2: 2}
    (best, cheaper) = (kept[0].layers[0] for kept in drawn[0].budgets.values())
    assert best.dropped == "".join(f"M0 {row}h{SIDE}v1h-{SIDE}z" for row in range(6, SIDE))
    assert cheaper.dropped == "".join(f"M0 {row}h{SIDE}v1h-{SIDE}z" for row in range(3, SIDE))
    assert best.edges.count("M") == SIDE  # one line of tokens between kept and dropped


def test_samples_are_of_different_images_and_categories() -> None:
    scenes = Scenes(count=6)
    records = [record(scenes, index, dropping(range(4)), right=True) for index in range(len(scenes))]
    chosen = {each.id: each for each in records if each.id in first_samples(records, 5)}
    assert len({each.image_id for each in chosen.values()}) == len({each.category for each in chosen.values()}) == 5


def test_the_benchmark_is_found_by_what_it_is_installed_as(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "runs")
    for folder in (path.parent for path in (tmp_path / "runs").glob("*-*/metrics.json")):
        content = json.loads((folder / "metrics.json").read_text())
        content["benchmark"]["name"] = "Scenes, as it is called"
        (folder / "metrics.json").write_text(json.dumps(content))
        (folder / "config.yaml").write_text("config: {benchmark: {name: scenes}}")
    study = study_of(tmp_path / "runs")
    assert study.benchmark == "Scenes, as it is called"
    (drawn,) = gallery(study, first_samples(study.unreduced.comparison.answered, 1))
    assert drawn.picture is not None


def test_a_benchmark_that_is_not_here_costs_its_pictures_alone(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*-*/metrics.json"):
        content = json.loads(path.read_text())
        content["benchmark"]["name"] = "somebody_elses"
        path.write_text(json.dumps(content))
    study = study_of(tmp_path / "runs")
    with pytest.warns(UserWarning, match="drawn without their pictures"):
        (drawn,) = gallery(study, first_samples(study.unreduced.comparison.answered, 1))
    assert drawn.picture is None
    assert len(drawn.kept) == 6
