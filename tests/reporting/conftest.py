"""Records of two runs over the first scenes, and a comparison's metrics, all made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenreduce.benchmarks.scenes import Scenes
from tokenreduce.evaluation.records import Record

from .made_up import TOKENS, dropping, method, record, write_sweep


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
def metrics() -> dict[str, Any]:
    return {
        "schema": 1,
        "run": {"hash": "5f1c", "folder": "fopru_row-5f1c", "identity": {"batch_size": 32}},
        "benchmark": {
            "name": "scenes",
            "samples": 30,
            "images": 6,
            "errors": 0,
            "failed": [],
            "categories": {"existence": 6, "counting": 6},
        },
        "methods": {
            "unreduced": method("none", 1, 0.9, TOKENS),
            "reducer": method("fopru_row", 1, 0.84, 36, keep=0.25, layer=-2),
            "random": method("random", 5, 0.76, 35.5, keep="as the reducer", seeds=5),
        },
        "settings": {"limit": None},
    }


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a made-up sweep: shared, so tests copy what they change."""
    return write_sweep(tmp_path_factory.mktemp("outputs") / "sweep", Scenes(count=6))
