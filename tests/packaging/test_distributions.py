"""What is built is the whole of it, and nothing else; it works from any directory."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from .environment import ROOT, Environment

pytestmark = pytest.mark.xdist_group("installed")

INSTALLED_AS = {"tokenreduce": "tokenreduce", "plugins": "tokenreduce_plugins", "conf": "tokenreduce_conf"}
ABOUT = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
MADE = ("PKG-INFO", "setup.cfg")


def source_files() -> dict[str, str]:
    """Every file that belongs into an installation, and its installed name."""
    return {
        str(path.relative_to(ROOT)): str(Path(package) / path.relative_to(ROOT / folder))
        for folder, package in INSTALLED_AS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_source_distribution_holds_every_file_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert {name for name in names if name not in MADE and ".egg-info/" not in name} == {*source_files(), *ABOUT}


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert names == set(source_files().values())
    assert len(licences) == 1


def test_what_is_imported_is_what_was_installed(environment: Environment, tmp_path: Path) -> None:
    code = "import sys; from importlib.util import find_spec; print(*(find_spec(name).origin for name in sys.argv[1:]))"
    names = "tokenreduce tokenreduce_plugins.fopru tokenreduce_conf"
    places = environment.run(f"python -c '{code}' {names}", tmp_path).split()
    assert all(Path(place).is_relative_to(environment.site) for place in places)
