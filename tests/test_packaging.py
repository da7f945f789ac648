"""What is built is the whole of it: from a wheel, from any directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALLED_AS = {"tokenreduce": "tokenreduce", "plugins": "tokenreduce_plugins", "conf": "tokenreduce_conf"}


def source_files() -> set[str]:
    """Every file that belongs into an installation, under its installed name."""
    return {
        str(Path(package) / path.relative_to(ROOT / folder))
        for folder, package in INSTALLED_AS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves folders in the source that could hide a forgotten file."""
    copy = tmp_path_factory.mktemp("source") / "tokenreduce"
    for folder in INSTALLED_AS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(copy.parent),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=copy.parent)
    (built,) = copy.parent.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert names == source_files()
    assert len(licences) == 1


def test_the_command_works_from_a_wheel_in_any_directory(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = """
        import runpy, sys, tokenreduce, tokenreduce_plugins.fopru as plugin
        print(tokenreduce.__file__, plugin.__file__)
        sys.argv[1:] = ["benchmark.limit=2", "evaluation.random_seeds=1", "evaluation.timing_pairs=0", "tracking=none"]
        runpy.run_module("tokenreduce", run_name="__main__")
    """
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert all(Path(place).is_relative_to(site) for place in outcome.stdout.splitlines()[0].split())
    assert "36 / 144" in outcome.stdout
    assert "warning" not in outcome.stderr
    assert [path.name for path in elsewhere.iterdir()] == ["outputs"]


def test_continuous_integration_runs_the_readmes_own_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r'grep -m1 "(.+?)" README\.md', script)
    assert pattern is not None
    commands = [line for line in readme.splitlines() if re.search(pattern[1], line)]
    assert commands == ["pip install -c constraints.txt -e '.[test]' && pytest"]
    assert "pip install -c constraints.txt -e . && python -m tokenreduce reducer=fopru_row" in readme
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_dependency_is_constrained() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    listed = re.findall(
        r'"([A-Za-z][A-Za-z0-9_-]+)[<>=]', project.split("[project]")[1].split("[project.entry-points")[0]
    )
    assert len(listed) > 12
    assert not [name for name in listed if not re.search(rf"^{name}==", constraints, re.MULTILINE | re.IGNORECASE)]
