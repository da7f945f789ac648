"""What users install, built once: the source distribution, the wheel made from it, and an environment with it.

The environment is a fresh virtual one that looks up what is not its own, such as torch, where these tests run; so it
takes seconds and no network.
"""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
from pathlib import Path

import pytest

from .environment import ROOT, Environment

NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "multirun", "wandb", "golden")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of everything: setuptools leaves folders in the source that could
    hide a forgotten file."""
    copy = tmp_path_factory.mktemp("source") / "tokenreduce"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(copy.parent)], check=True, capture_output=True, cwd=copy)
    (built,) = copy.parent.glob("*.tar.gz")
    return built


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True, cwd=folder
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A virtual environment with the wheel. Shared: tests uninstall what they install."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "running.pth").write_text("\n".join(site.getsitepackages()))
    for name, call in {"pip": "pip._internal.cli.main:main", "pytest": "pytest:console_main"}.items():
        module, function = call.split(":")
        script = folder / "bin" / name
        script.write_text(
            textwrap.dedent(f"""\
                #!{python}
                import sys
                from {module} import {function}
                sys.exit({function}())
                """)
        )
        script.chmod(0o755)
    environment = Environment(folder, own)
    environment.run(f"pip install --no-deps --ignore-installed {wheel}", folder)
    return environment
