"""Records of two runs over the first scenes, and a comparison's result, all made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenreduce.benchmarks.scenes import Scenes
from tokenreduce.evaluation.records import Record
from tokenreduce.evaluation.result import Result

from .made_up import TOKENS, dropping, method, record, result, write_sweep


@pytest.fixture
def scenes() -> Scenes:
    return Scenes(count=6)


@pytest.fixture
def unreduced(scenes: Scenes) -> list[Record]:
    return [record(scenes, index, (), right=True) for index in range(len(scenes))]


@pytest.fixture
def reduced(scenes: Scenes) -> list[Record]:
    return [record(scenes, index, dropping(range(36)), right=index % 3 > 0) for index in range(len(scenes))]


@pytest.fixture
def compared() -> Result:
    """A comparison's result."""
    return result(
        "fopru_row-5f1c",
        {
            "unreduced": method("none", 1, 0.9, TOKENS),
            "reducer": method("fopru_row", 1, 0.84, 36, keep=0.25, layer=-2),
            "random": method("random", 5, 0.76, 35.5, keep="as the reducer", seeds=5),
        },
    )


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a made-up sweep: shared, so tests copy what they change."""
    return write_sweep(tmp_path_factory.mktemp("outputs") / "sweep", Scenes(count=6))
