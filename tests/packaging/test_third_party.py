"""A reducer, a benchmark and a model family of other people work in every process there is, and a broken package beside
them hurts nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenreduce.catalog.scaffold import create_package
from tokenreduce.evaluation import read_records
from tokenreduce.testing.checkpoints import write_checkpoint

from .environment import Environment
from .test_tutorial import blocks

pytestmark = pytest.mark.xdist_group("installed")

PACKAGES = ("brightest", "glance", "greys", "ours", "wrecked")
QUICK = "benchmark.limit=6 evaluation.random_seeds=1 evaluation.timing_pairs=0 evaluation.pictures=0 tracking=none"
GLANCE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "glance"
version = "1.0"

[project.entry-points."tokenreduce.reducers"]
glance = "glance:Glance"
""",
    "src/glance/__init__.py": '''
from dataclasses import dataclass

import torch

from tokenreduce.reducer import AtProjector, Geometry, Keep, ScoreReducer, Step, VisualTokens
from tokenreduce.signals import Signal, View, Watch


@dataclass(frozen=True)
class Contrast(Signal):
    """How much the pixels that every token of a picture shows differ, times how long a layer's states are."""

    layer: float = 0.5

    def watch(self, watch: Watch) -> None:
        watch.encoder_hidden(self.layer)

    def value(self, view: View) -> torch.Tensor:
        (tile,), (pixels,) = view.scene.tiles, view.scene.pixels
        rows = pixels.float().squeeze(0).tensor_split(tile.grid.height, dim=1)
        cells = [cell for row in rows for cell in row.tensor_split(tile.grid.width, dim=2)]
        return torch.stack([cell.std() for cell in cells]) * view.encoder_hidden(self.layer).norm(dim=-1)


@dataclass(frozen=True)
class Glance(ScoreReducer):
    """Keeps what catches the eye."""

    keep: Keep = 0.5

    def steps(self, geometry: Geometry) -> list[Step]:
        return [AtProjector(keep=self.keep, sees=(Contrast(),))]

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens[Contrast()]
''',
}
"""A package with a signal of its own."""
WRECKED = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "wrecked"
version = "1.0"

[project.entry-points."tokenreduce.reducers"]
wrecked = "wrecked:Wrecked"
fopru_row = "wrecked:Thief"

[project.entry-points."tokenreduce.models"]
wrecked = "wrecked:Wrecked"

[project.entry-points."tokenreduce.configs"]
wrecked = "wrecked.conf"
"""


@pytest.fixture
def folder(environment: Environment, tmp_path: Path) -> Iterator[Path]:
    """An empty folder but for a checkpoint of the family's class, while the packages are installed, not editable."""
    sources, here = tmp_path / "sources", tmp_path / "here"
    create_package("brightest", sources)
    for block in blocks():
        if block.title and block.title.split("/")[0] in ("greys", "ours"):
            file = sources / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    for name, text in GLANCE.items():
        file = sources / "glance" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    broken = sources / "wrecked" / "src" / "wrecked" / "conf"
    broken.mkdir(parents=True)
    (sources / "wrecked" / "pyproject.toml").write_text(WRECKED)
    (broken / "__init__.py").touch()
    (broken.parent / "__init__.py").write_text("raise RuntimeError('out of order')\n")
    write_checkpoint("llava", here / "checkpoint")
    (script,) = (block.text for block in blocks() if block.title == "fine_tune.py")
    environment.run(f"pip install {' '.join(f'./{name}' for name in PACKAGES)}", sources)
    try:
        assert set(PACKAGES) <= installed(environment, here)
        environment.run(f"python - <<'EOF'\n{script.replace('tiny', 'checkpoint')}EOF", here)
        yield here
    finally:
        environment.run(f"pip uninstall --yes {' '.join(PACKAGES)}", here)
    assert not set(PACKAGES) & installed(environment, here)


def installed(environment: Environment, folder: Path) -> set[str]:
    """The names of all packages that Python finds."""
    code = "from importlib.metadata import distributions; print(*(each.metadata['Name'] for each in distributions()))"
    return set(environment.run(f'python -c "{code}"', folder).split())


def answers(output: Path, reducer: str) -> list[list[tuple[str, str | None, tuple[int, ...]]]]:
    """What each run of a reducer found out: samples, answers and the tokens that stayed."""
    found = []
    for run in output.glob(f"{reducer}-*"):
        records = read_records(run)
        assert [record.error for record in records] == [None] * 6
        found.append([(record.id, record.answer, record.images[0].steps[-1].index) for record in records])
    return found


def test_they_work_in_the_processes_of_any_launcher(environment: Environment, folder: Path) -> None:
    """Two processes share one evaluation; two workers share the jobs of a sweep, one of a preset, and one of a method
    that sees by a signal of its own package."""
    ours = f"model.path=fine_tune benchmark=greys benchmark.cards=9 {QUICK}"
    # Where there is no GPU, this option is how accelerate starts several processes without MPI.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    printed = environment.run(
        f"python -m accelerate.commands.launch {options} -m tokenreduce reducer=brightest reducer.keep=9 {ours}"
        " output=shared",
        folder,
        CUDA_VISIBLE_DEVICES="",
    )
    assert "wrecked is skipped: RuntimeError: out of order" in printed
    assert "'fopru_row' of wrecked is ignored: the name belongs to tokenreduce" in printed
    assert "brightest keep=9" in printed

    printed = environment.run(
        f"python -m tokenreduce -m launcher=joblib hydra.launcher.n_jobs=2 output=sweep {ours}"
        " 'reducer=brightest_64,brightest,glance' reducer.keep=9",
        folder,
    )
    shared, swept = answers(folder / "shared", "brightest"), answers(folder / "sweep", "brightest")
    assert shared[0] in swept
    (glanced,) = answers(folder / "sweep", "glance")
    assert {len(index) for _, _, index in glanced} == {9}
    assert [index for _, _, index in glanced] != [index for _, _, index in shared[0]]
    checked = environment.run("python -m tokenreduce.catalog check glance", folder)
    assert "checks passed" in checked
    assert "Contrast" in environment.run("python -m tokenreduce.catalog list glance", folder)
