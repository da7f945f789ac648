"""A virtual environment, and commands in it as a user would type them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it."""

    folder: Path
    site: Path

    def run(self, command: str, folder: Path, status: int | None = 0, **variables: str) -> str:
        """What a shell command prints in ``folder``, as on a machine without a package index."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "PYTEST"))}
        outcome = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env={
                **kept,
                "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "PIP_NO_INDEX": "1",
                "PIP_QUIET": "1",
                "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the option's value: no isolation
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                "COLUMNS": "120",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert status is None or outcome.returncode == status, f"{command}\n{outcome.stdout}"
        return outcome.stdout
